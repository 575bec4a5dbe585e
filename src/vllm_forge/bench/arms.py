"""What an arm is: image, model, GPUs and conditions; and a session's plan on this host."""

import argparse
import hashlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from vllm_forge.bench.claims import CLAIMS, REMEDY, read_claims
from vllm_forge.bench.errors import ArmUnknownError, ClaimsFileError, SessionFileError
from vllm_forge.bench.hardware import listed_gpus
from vllm_forge.bench.measure import read_workload
from vllm_forge.bench.results import Arm, Conditions, Server, Setup
from vllm_forge.bench.session import UNKNOWN, ArmRow, Kept, Launch, Plan, Session, read_session
from vllm_forge.bench.workloads import Loaded, Source, lines, load
from vllm_forge.errors import UsageError, suggestion
from vllm_forge.host import Probe, Reply, hash_of, parse_json, read_plain
from vllm_forge.host.files import file_digest
from vllm_forge.images.layout import hex_digest, read_image
from vllm_forge.images.prewarm import FOLDERS
from vllm_forge.images.record import built_digest
from vllm_forge.matrix import ImageCell, flags
from vllm_forge.matrix.model import Name
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.serve.command import (
    ENGINES,
    Engine,
    ServeOptions,
    bare_command,
    choose_gpus,
    container_command,
    running_engine,
    service_of,
)
from vllm_forge.serve.deployment import Deployment, find_deployment

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
# What listens on an address, as engines list it; localhost may be either address.
IPV4, IPV6 = {"127.0.0.1", "0.0.0.0"}, {"[::1]", "[::]", "::"}  # noqa: S104
LOOPBACK = {"127.0.0.1": [IPV4], "::1": [IPV6], "localhost": [IPV4, IPV6]}
SERVES = {"--port", flags.NAME}  # arguments that `serve` adds to a preset's
NONE = hashlib.sha256(b"").hexdigest()  # of a file that a checkpoint does not have


def arm_of(
    project: Project, probe: Probe, args: argparse.Namespace, prompts_sha256: str,
    asked: Mapping[str, Any],
) -> tuple[Deployment, Setup]:  # fmt: skip
    """What is served and measured; ArmUnknownError if the image or GPUs are unknown.

    ``asked``: see `conditions_of`.
    """
    cell = project.cell(args.sku, args.line)
    deployment = find_deployment(project.matrix, cell, args.preset, args.artifact)
    subject = _subject(project, cell)
    gpus = listed_gpus(probe)
    url, layout = vars(args).get("url") or "", project.root / "dist" / cell.name
    seen = answers(probe, url, subject["image"], layout, deployment.arguments)
    gpu = {"gpu": gpus[0].name, "driver": gpus[0].driver or UNKNOWN}
    server = _server(deployment, subject, claimed=not seen, **gpu)
    conditions = conditions_of(
        asked, Path(args.workload), args.concurrency, prompts_sha256, args.checkpoint
    )
    names = {name: _name(f"--{name}", getattr(args, name)) for name in ("arm", "session")}
    differs = tuple(args.differs or ())
    return deployment, Setup(**names, conditions=conditions, server=server, differs=differs)


def published(project: Project, arms: Sequence[Arm]) -> Iterator[tuple[str, float | None]]:
    """Each published rate with what was measured over it, None where that was not run.

    Of a preset's very command, the workload and the concurrency. ClaimsFileError: an arm is served
    by an unknown preset.
    """
    claims, matrix = read_claims(project.root / CLAIMS), project.matrix
    for row in claims.published:
        served = claims.serve[row.arm]
        if served.preset not in matrix.preset:
            what = f"serve.{row.arm}: unknown preset {served.preset!r}"
            what += suggestion(served.preset, matrix.preset)
            raise ClaimsFileError(what, where=CLAIMS, remedy=REMEDY)
        sku = matrix.preset[served.preset].sku
        lines = [name for name, line in matrix.line.items() if sku in line.skus]
        argv = {
            bare_command(
                find_deployment(matrix, project.cell(sku, line), served.preset, served.artifact)
            ).argv
            for line in lines
        }
        rates = [
            rate
            for arm in arms
            if arm.result.server.argv in argv
            and arm.result.server.gpu.startswith(matrix.sku[sku].device)
            and arm.result.conditions.workload == row.workload
            and arm.result.conditions.concurrency == row.concurrency
            for rate in arm.rates().values()
        ]
        name = f"{row.arm}, {row.workload}, c={row.concurrency}: {row.value} tok/s"
        yield name, statistics.fmean(rates) / float(row.value) if rates else None


def asked_by(options: argparse.Namespace | Session) -> dict[str, Any]:
    """What the options of a command or a session ask for."""
    names = ("thinking", "max_tokens", "ignore_eos", "prefix_cache")
    return {"temperature": 0.0, **{name: getattr(options, name) for name in names}}


def conditions_of(
    asked: Mapping[str, Any], workload: Path, concurrency: int, prompts_sha256: str,
    checkpoint: Path,
) -> Conditions:  # fmt: skip
    """With what is ``asked``, by options or by a workload's row; UsageError."""
    if not checkpoint.is_dir():  # without this, one that has no tokenizer
        remedy = "give the folder of the served model: its tokenizer and template are hashed"
        raise UsageError(f"checkpoint not found: {checkpoint}", remedy=remedy)
    return Conditions(
        workload=_name("workload", workload.stem),
        prompts_sha256=prompts_sha256,
        template_sha256=_hash(checkpoint / TEMPLATE),
        tokenizer_sha256=_hash(checkpoint / TOKENIZER),
        concurrency=concurrency,
        **asked,
    )


def plan_of(
    project: Project, probe: Probe, cell: ImageCell, path: Path, *, caches: Path,
    engine: Engine | None,
) -> tuple[Plan, bytes]:  # fmt: skip
    """The plan of a session's file on this host, and the content of its workload.

    Servers keep what they compile in ``caches``.
    """
    session, subject = read_session(path), _subject(project, cell)
    arms = {}
    for name, row in session.arm.items():
        if row.preset is None:
            arms[name] = _command(row, subject, str(caches), path, claimed=True)
        else:
            deployment = find_deployment(project.matrix, cell, row.preset, row.artifact)
            arms[name] = _container(
                probe, deployment, session, name, caches=caches, subject=subject, engine=engine
            )
    return _plan(session, path, arms, path.parent / session.checkpoint, str(caches))


def carried_plan(
    path: Path, subject: dict[str, str], checkpoints: Mapping[str, Path], caches: str
) -> tuple[Plan, bytes]:
    """The plan of a session that a kit carries; ``checkpoints``: by name.

    SessionFileError: an arm needs a container engine, or the kit lacks the checkpoint.
    """
    session, what = read_session(path), ""
    presets = [name for name, row in session.arm.items() if row.preset is not None]
    if presets:
        what, remedy = f"arm {presets[0]} needs a container engine", "give its command"
    elif session.checkpoint not in checkpoints:
        what = f"the kit has no checkpoint {session.checkpoint}"
        remedy = f"add --checkpoint {session.checkpoint}=DIR"
    if what:
        raise SessionFileError(what, where=path, remedy=remedy)
    arms = {name: _command(row, subject, caches, path) for name, row in session.arm.items()}
    return _plan(session, path, arms, checkpoints[session.checkpoint], caches)


def _plan(
    session: Session, path: Path, arms: dict[str, Launch], checkpoint: Path, caches: str
) -> tuple[Plan, bytes]:
    gpus = {name: launch.server.gpus for name, launch in arms.items()}
    if (len(set(gpus.values())) > 1) != ("gpus" in session.differs):
        counts = ", ".join(f"{name} {number}" for name, number in gpus.items())
        what = f"differs does not match the GPUs of the arms: {counts}"
        remedy = 'write differs = ["gpus"] if arms have unequal numbers of GPUs, else remove "gpus"'
        raise SessionFileError(what, where=path, remedy=remedy)
    quality = None
    if loaded := _questions(session, path):
        workload, asked = path.with_name(f"{loaded.name}.jsonl"), loaded.asked()
        asked["ignore_eos"] = session.ignore_eos
        content, digest = lines(loaded, repeats=True), loaded.digest
        prompts = hashlib.sha256(content).hexdigest()
        quality = Kept(license=loaded.license, prompts_sha256=prompts)
    else:
        workload, asked = path.with_name(session.workload or ""), asked_by(session)
        content, (_, digest) = read_plain(workload), read_workload(workload)
    conditions = tuple(
        conditions_of(asked, workload, level, digest, checkpoint) for level in session.concurrency
    )
    names = ("session", "warm", "port", "crosscheck", "differs")
    plan = Plan(
        turns=session.turns, arms=arms, conditions=conditions, caches=(caches,),
        workload=workload.name, ready_s=60 * session.ready_minutes, quality=quality,
        **{name: getattr(session, name) for name in names},
    )  # fmt: skip
    return plan, content


def _questions(session: Session, path: Path) -> Loaded | None:
    """What a session asks for quality; SessionFileError if it has no right answers."""
    if (asked := session.quality) is None:
        return None
    source = None
    if asked.data and asked.sha256 and asked.license:
        source = Source(path.with_name(asked.data), asked.sha256, asked.license)
    loaded = load(asked.workload, source)
    if loaded.row.scorer == "none":
        what = f"quality.workload: {loaded.name} has no right answers"
        raise SessionFileError(what, where=path, remedy="give its prompts as workload")
    return loaded


def _container(
    probe: Probe, deployment: Deployment, session: Session, arm: str, *, caches: Path,
    subject: dict[str, str], engine: Engine | None,
) -> Launch:  # fmt: skip
    """A server's container as `serve` starts it, with ``caches`` as its cache."""
    name, chosen = f"vllm-forge-bench-{arm}", running_engine(probe, engine)
    variables = session.arm[arm].env
    deployment = replace(deployment, env=tuple(f"{k}={v}" for k, v in variables.items()))
    gpu_ids = choose_gpus(probe, deployment, 1)
    options = ServeOptions(port=session.port, name=name, gpu_ids=gpu_ids)
    service = service_of(deployment, options, digest=subject["image"])
    volumes = [f"{caches}:/cache" if v.endswith(":/cache") else v for v in service.volumes]
    command = container_command(service.model_copy(update={"volumes": volumes}), engine=chosen)
    return Launch(
        argv=command.argv, env=command.env, remove=(chosen, "rm", "--force", name),
        model=deployment.artifact.repo,
        server=_server(deployment, subject, env_sha256=_digest(variables)),
    )  # fmt: skip


def _server(deployment: Deployment, subject: Mapping[str, str], **facts: Any) -> Server:
    """``facts``: of the GPU, where it is known, and others."""
    known = {"gpu": UNKNOWN, "driver": UNKNOWN, **subject, **facts}
    argv, gpus = bare_command(deployment).argv, deployment.spread.gpus
    return Server(artifact=deployment.artifact_name, argv=argv, gpus=gpus, **known)


def _command(
    row: ArmRow, subject: dict[str, str], caches: str, path: Path, *, claimed: bool = False
) -> Launch:
    """A command whose compilers keep their kernels in ``caches``; SessionFileError."""
    variables = {variable: f"{caches}/{name}" for name, variable in FOLDERS.items()}
    if own := sorted(variables.keys() & row.env.keys()):
        remedy = "leave it out: what the server compiles is watched there"
        raise SessionFileError(f"{own[0]} is set by bench", where=path, remedy=remedy)
    server = Server(
        **subject, artifact=row.artifact or row.model, argv=row.command, gpu=UNKNOWN,
        gpus=flags.parallel(row.command).gpus, driver=UNKNOWN, claimed=claimed,
        env_sha256=_digest(row.env),
    )  # fmt: skip
    return Launch(argv=row.command, env={**variables, **row.env}, model=row.model, server=server)


def _subject(project: Project, cell: ImageCell) -> dict[str, str]:
    """The image that was built here, and what it was made of; ArmUnknownError."""
    path = project.root / "dist" / f"{cell.name}.json"
    if (digest := built_digest(path)) is None:
        remedy = (
            "a result is of one image digest; build it here: "
            f"nox -s forge -- build {cell.sku_name} --line {cell.line_name}"
        )
        raise ArmUnknownError(f"{cell.name} is not built", where=str(path), remedy=remedy)
    return {
        "image": digest,
        "tree": read_tree_lock(project.root / cell.line.series, cell.line_name).result,
        "lock_sha256": file_digest(project.root / cell.line.lock),
    }


def answers(
    probe: Probe, url: str, image: str, layout: Path, arguments: Sequence[str] = ()
) -> bool:
    """Whether a container of the image answers at ``url``; False if no engine here has it.

    ArmUnknownError: the container that has the port is of another image, or has other arguments.
    The classic store of docker knows an image by its configuration's digest, which the build's
    ``layout`` has.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or {"http": 80}.get(parts.scheme)
    except ValueError as error:
        raise UsageError(f"invalid --url: {error}", remedy="give http://HOST:PORT") from None
    if host not in LOOPBACK:
        return False
    for engine in ENGINES:
        argv = [engine, "ps", "--no-trunc", "--format={{.ID}} {{.Ports}}"]
        listed = probe.ask(f"{engine}-ps", argv)
        for row in listed.text.splitlines() if listed.code == 0 else ():
            name, _, ports = row.partition(" ")
            ends = {one.partition("->")[0] for one in ports.split(", ") if one.endswith("/tcp")}
            if not all(ends & {f"{place}:{port}" for place in places} for places in LOOPBACK[host]):
                continue
            reply = probe.ask(f"{engine}-inspect", [engine, "inspect", name])
            digests, words = _container_facts(reply, name)
            problem, lacks = "", [word for word in arguments if word not in words]
            more = [word for word in words if word.startswith("-") and word not in arguments]
            more = [name for word in more if (name := word.partition("=")[0]) not in SERVES]
            if not digests & {hex_digest(image), _configuration(layout, image)} - {""}:
                problem = f"the server's image is {' or '.join(sorted(digests))}, not {image}"
            elif lacks:
                problem = f"the server was not started as the preset says: it lacks {lacks[0]}"
            elif more:  # it may replace one of the preset's; values may be secret
                problem = f"the server was not started as the preset says: it also has {more[0]}"
            if problem:
                remedy = "serve this preset with the image that was built here"
                raise ArmUnknownError(problem, where=f"{url}, container {name}", remedy=remedy)
            return True
    return False


def _configuration(layout: Path, image: str) -> str:
    """The digest of an image's configuration, from its build; empty where that is gone."""
    built = read_image(layout) if layout.is_dir() else None
    if built is None or built.digest != hex_digest(image):
        return ""
    return hex_digest(built.manifest["config"]["digest"])


def _container_facts(reply: Reply, name: str) -> tuple[set[str], list[str]]:
    """Digests by which an engine knows a container's image, and the words of its command."""
    try:
        (row,) = parse_json(reply.text)
        found = [row["Image"], row.get("ImageDigest"),
                 (row.get("ImageManifestDescriptor") or {}).get("digest")]  # fmt: skip
        return {hex_digest(text) for text in found if text}, list(row["Config"]["Cmd"] or ())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what, remedy = f"unexpected answer on a container: {error!r}", "update the engine"
        raise ArmUnknownError(what, where=name, remedy=remedy) from None


def _name(option: str, text: str) -> str:
    try:
        return TypeAdapter(Name).validate_python(text)
    except ValidationError:
        what = f"invalid {option} {text!r}: expected lower-case letters, digits, '.', '_' and '-'"
        raise UsageError(what, remedy="give another name") from None


def _digest(variables: Mapping[str, str]) -> str | None:
    """Of their values, too, which may be secret."""
    return hash_of(variables, sort_keys=True) if variables else None


def _hash(path: Path) -> str:
    return file_digest(path) if path.exists() else NONE
