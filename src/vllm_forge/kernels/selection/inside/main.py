"""Answer questions about this environment's vLLM, each in a process of its own.

Reads ``questions.json`` next to this package, prints one JSON list of answers as its last line,
and exits 0 if it could run at all: the host decides what an answer means.

There are three generations of processes, as imports take longer than answers. The first one
imports modules that read neither the device nor a question's variables. Each of its children is a
world: it declares a device and imports vLLM, which keeps what it asked the platform. A world's
children answer one question each. A question whose variables vLLM read while it was imported gets
a world of its own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .device import DeclaredDevice
from .driver import Device, build_stubs
from .serving import (
    Refusal,
    attach_log,
    clean,
    make_config,
    similar_names,
    unknown_environment,
)

HOME = Path(__file__).resolve().parents[1]
MOST_WORLDS = 8  # at a time; each takes about 2 GB
WARNING = 30  # logging.WARNING
ALWAYS = {
    "HF_HUB_OFFLINE": "1",
    "HOME": "/tmp",  # noqa: S108 - the container's own
    # humming/utils/nvrtc.py:106, humming/ops/utils.py:132 (0.1.10): importing it starts two more
    # Pythons, which import torch to compile kernels that nothing here launches.
    "HUMMING_DISABLE_PARALLEL_BUILD": "1",
    "OMP_NUM_THREADS": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
# Imported once for all worlds, where the line has it.
COMMON = (
    "torch._dynamo", "torchvision", "transformers.models.auto.modeling_auto", "tilelang",
    "cutlass.cute", "humming", "openai", "compressed_tensors.quantization", "cv2", "fastapi",
)  # fmt: skip
# Needed by every question. The first question of a world shows which others to import.
MODULES = (
    "vllm",
    "vllm.engine.arg_utils",
    "vllm.entrypoints.cli.serve",
    "vllm.model_executor.model_loader.utils",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.layers.quantization.modelopt",
    "vllm.models.deepseek_v4.nvidia.model",
    "vllm.models.deepseek_v4.nvidia.mtp",
)

if TYPE_CHECKING:
    from collections.abc import Iterable

Facts = dict[str, Any]


def main() -> None:
    """Answer all questions, device by device."""
    request = json.loads((HOME / "questions.json").read_text())
    questions = request["questions"]
    os.environ.update(ALWAYS)
    gc.disable()  # it would walk millions of objects, and copy their pages in every child
    reads = _watch_environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_stubs(folder)
        for artifact, files in request["artifacts"].items():
            (folder / artifact).mkdir()
            for file, content in files.items():
                (folder / artifact / file).write_text(json.dumps(content))
        declared = DeclaredDevice(folder)
        for module in COMMON:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        variables = {name for question in questions for name in question["environment"]}
        if wrong := [*declared.early_calls, *sorted(reads & variables)]:
            raise AssertionError(f"importing COMMON reads the device or a variable: {wrong}")
        answers = _ask_worlds(questions, folder, declared, reads)
    print("\n" + json.dumps([answers[question["name"]] for question in questions]), flush=True)
    os._exit(0)  # tearing torch down takes seconds


def _watch_environment() -> set[str]:
    """The names of all variables that are read from now on."""
    reads: set[str] = set()

    class Watched(type(os.environ)):  # type: ignore[misc]
        def __getitem__(self, key: Any) -> Any:
            reads.add(key if isinstance(key, str) else os.fsdecode(key))
            return super().__getitem__(key)

    os.environ.__class__ = Watched
    return reads


def _ask_worlds(
    questions: list[Facts], folder: Path, declared: DeclaredDevice, reads: set[str]
) -> dict[str, Facts]:
    """Run as many worlds at a time as there are cores, the large ones first."""
    groups: dict[str, list[Facts]] = {}
    for question in questions:
        groups.setdefault(json.dumps(question["device"], sort_keys=True), []).append(question)
    most = min(len(os.sched_getaffinity(0)), MOST_WORLDS)
    parts = max(1, most // len(groups))
    waiting = [part for group in groups.values() for part in _split(group, parts)]
    waiting.sort(key=len)
    running: dict[int, tuple[list[Facts], Path]] = {}
    answers: dict[str, Facts] = {}
    started = 0
    while waiting or running:
        while waiting and len(running) < most:
            group, path = waiting.pop(), folder / f"world-{started}.json"
            started += 1
            running[_fork(_world, path, group, folder, declared, reads)] = group, path
        pid = _first_ended(running)
        group, path = running.pop(pid)
        status = os.waitpid(pid, 0)[1]
        if status != 0 or not path.exists():
            refused = {"kind": "failed", "message": f"a world ended with status {status}"}
            answers |= {q["name"]: {"name": q["name"], "refused": refused} for q in group}
            continue
        answers |= {answer["name"]: answer for answer in json.loads(path.read_text())}
        waiting += [[question] for question in group if question["name"] not in answers]
    return answers


def _split(group: list[Facts], parts: int) -> list[list[Facts]]:
    """Split the questions into lists of about the same length."""
    return [part for start in range(parts) if (part := group[start::parts])]


def _first_ended(pids: Iterable[int]) -> int:
    """Wait for one of these children; libraries have children of their own."""
    files = {os.pidfd_open(pid): pid for pid in pids}
    try:
        return files[select.select(files, (), ())[0][0]]
    finally:
        for file in files:
            os.close(file)


def _fork(work: Any, *arguments: Any) -> int:
    """Start a child that does the work and ends; returns its process ID."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work(*arguments)
        status = 0
    except BaseException:  # noqa: BLE001 - os._exit would hide it
        traceback.print_exc()
    finally:
        os._exit(status)


def _world(
    path: Path, questions: list[Facts], folder: Path, declared: DeclaredDevice, reads: set[str]
) -> None:
    """Declare a device, import vLLM, answer each question in a child, and write the answers."""
    declared.declare(Device(**questions[0]["device"]))
    first, *others = (question["environment"] for question in questions)
    common = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
    os.environ.update(common)
    for name in MODULES:
        importlib.import_module(name)
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    # vLLM looks at a model's class in a fresh process, so as not to initialize CUDA in this one.
    registry._run_in_subprocess = lambda function: function()
    answers: list[Facts] = []
    for question in questions:
        late = question["environment"].keys() - common.keys()
        if reads & late:
            continue  # gets a world of its own
        answers.append(_in_child(question, folder))
        for name in answers[-1].pop("imported", []):
            with contextlib.suppress(Exception):  # it failed in the child as well
                importlib.import_module(name)
    path.write_text(json.dumps(answers))


def _in_child(question: Facts, folder: Path) -> Facts:
    reader, writer = os.pipe()
    pid = _fork(_write_answer, writer, question, folder)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    if not text:
        refused = {"kind": "failed", "message": "the process died"}
        return {"name": question["name"], "refused": refused}
    answer: Facts = json.loads(text)
    return answer


def _write_answer(writer: int, question: Facts, folder: Path) -> None:
    with os.fdopen(writer, "w") as out:
        json.dump(_answer(question, folder), out)


def _answer(question: Facts, folder: Path) -> Facts:
    before = set(sys.modules)
    start = time.monotonic()
    answer: Facts = {"name": question["name"]}
    try:
        _fill(answer, question, folder)
    except Refusal as refusal:
        answer["refused"] = {"kind": refusal.kind, "message": str(refusal)}
    except Exception as error:  # noqa: BLE001 - one wrong question must not end the others
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = clean(
            f"{type(error).__name__} in {place.filename}:{place.lineno}, {place.name}: {error}"
        )
        answer["refused"] = {"kind": "failed", "message": message}
    answer["imported"] = sorted(set(sys.modules) - before)
    answer["seconds"] = round(time.monotonic() - start, 2)
    return answer


def _fill(answer: Facts, question: Facts, folder: Path) -> None:
    # After the world's imports.
    from . import building, experts, facts, startup  # noqa: PLC0415

    log = attach_log()
    answer["unknown_environment"] = unknown_environment(question["environment"])
    answer["similar"] = similar_names(question["environment"])
    os.environ.update(question["environment"])
    with log.listen() as lines:
        config = make_config(str(folder / question["artifact"]), question["arguments"])
    answer["warnings"] = list(dict.fromkeys(text for level, text in lines if level >= WARNING))
    with importlib.import_module("vllm.config").set_current_vllm_config(config):
        models = building.build_models(config, log)
        answer["attention"] = facts.attention_facts(config)
        answer["linear"] = facts.linear_facts(config, models.model)
        answer["moe"] = experts.moe_facts(models.model, models.selections, log)
        if models.model is not None:
            answer["modules"] = facts.module_schemes(models.model)
        if models.draft is not None:
            speculative = config.speculative_config
            answer["draft"] = {
                "architecture": str(speculative.draft_model_config.hf_config.architectures[0]),
                "speculative_tokens": speculative.num_speculative_tokens,
                "modules": facts.module_schemes(models.draft),
                "moe": experts.moe_facts(models.draft, models.draft_selections, log),
            }
        if models.refusal is not None:
            raise models.refusal
        platform: Any = importlib.import_module("vllm.platforms").current_platform
        platform.update_block_size_for_backend(config)
        answer["engine"] = facts.engine_facts(config)
        answer["kv_cache"] = facts.kv_facts(config)
        answer["chat"] = facts.chat_facts(config)
        with startup.refused_late(), log.listen() as lines:
            answer["cuda_graphs"] = facts.graph_facts(config, models.model)
        answer["warnings"] += [text for level, text in lines if level >= WARNING]
        startup.check_startup(config, models)
    if answer["attention"] is not None and answer["attention"]["error"]:
        raise Refusal("device", answer["attention"]["error"])
    startup.check_first_forward(models)
