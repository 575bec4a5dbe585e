"""What an arm is: the image, model and GPUs that are served, and the conditions."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vllm_forge.bench.errors import ArmUnknownError
from vllm_forge.bench.results import Conditions, Server
from vllm_forge.errors import UsageError
from vllm_forge.host import Probe
from vllm_forge.host.files import file_digest
from vllm_forge.host.probe import GPU_QUERY
from vllm_forge.images.record import built_digest
from vllm_forge.matrix.model import Name
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.serve.command import bare_command
from vllm_forge.serve.deployment import Deployment, find_deployment
from vllm_forge.serve.doctor import listed_gpus

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
NONE = hashlib.sha256(b"").hexdigest()  # of a file that a checkpoint does not have


def arm_of(
    project: Project, probe: Probe, args: argparse.Namespace, prompts_sha256: str
) -> tuple[Deployment, dict[str, Any]]:
    """The deployment, and a record's fields; ArmUnknownError if the image or GPUs are unknown."""
    cell = project.cell(args.sku, args.line)
    deployment = find_deployment(project.matrix, cell, args.preset, args.artifact)
    path = project.root / "dist" / f"{cell.name}.json"
    if (digest := built_digest(path)) is None:
        remedy = "build it here: a result is of one image digest"
        raise ArmUnknownError("the cell's image is not built", where=str(path), remedy=remedy)
    gpus, message = listed_gpus(probe.ask("nvidia-smi", GPU_QUERY))
    if not gpus:
        remedy = "run this on the host that serves"
        raise ArmUnknownError(f"no GPU is listed: {message}", where="nvidia-smi", remedy=remedy)
    _, line = project.line(cell.line_name)
    server = Server(
        image=digest,
        tree=read_tree_lock(project.root / line.series, cell.line_name).result,
        lock_sha256=file_digest(project.root / line.lock),
        artifact=deployment.artifact_name,
        argv=bare_command(deployment).argv,
        gpu=gpus[0].name,
        gpus=deployment.spread.gpus,
        driver=gpus[0].driver or "unknown",
    )
    conditions = Conditions(
        workload=_name("--workload", args.workload.stem),
        prompts_sha256=prompts_sha256,
        template_sha256=_hash(args.checkpoint / TEMPLATE),
        tokenizer_sha256=_hash(args.checkpoint / TOKENIZER),
        thinking=args.thinking,
        temperature=0.0,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        concurrency=args.concurrency,
        prefix_cache=args.prefix_cache,
    )
    fields = {"arm": _name("--arm", args.arm), "session": _name("--session", args.session)}
    return deployment, {**fields, "conditions": conditions, "server": server}


def _name(option: str, text: str) -> str:
    try:
        return TypeAdapter(Name).validate_python(text)
    except ValidationError:
        what = f"invalid {option} {text!r}: expected lower-case letters, digits, '.', '_' and '-'"
        raise UsageError(what, remedy="give another name") from None


def _hash(path: Path) -> str:
    return file_digest(path) if path.exists() else NONE
