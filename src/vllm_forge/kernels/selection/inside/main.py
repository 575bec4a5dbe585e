"""Answers questions about this environment's vLLM, each in a process of its own.

Reads ``questions.json`` beside this package, prints one JSON list of answers as its last line,
and exits 0 if it could run at all: the host decides what an answer means.

Three generations of processes, for imports take longer than answers. The first one imports what
asks neither for the device nor for a question's variables. Each of its children is a world: it
declares a device and imports vLLM, which keeps what it asked the platform. A world's children
answer one question each. A question whose variables vLLM read while it was imported gets a
world of its own.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .device import Declared
from .driver import Device, build_stubs
from .serving import (
    Refusal,
    attach_log,
    clean,
    engine_facts,
    make_config,
    unknown_environment,
)

HOME = Path(__file__).resolve().parents[1]
MOST_WORLDS = 8  # at a time; each takes about 2 GB
WARNING = 30  # logging.WARNING
ALWAYS = {
    "HF_HUB_OFFLINE": "1",
    "HOME": "/tmp",  # noqa: S108 - the container's own
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
# What every question needs; what else one needs, the first one of a world tells.
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
    asked = json.loads((HOME / "questions.json").read_text())
    questions = asked["questions"]
    os.environ.update(ALWAYS)
    gc.disable()  # it would walk millions of objects, and copy their pages in every child
    reads = _watch_environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_stubs(folder)
        for artifact, files in asked["artifacts"].items():
            (folder / artifact).mkdir()
            for file, content in files.items():
                (folder / artifact / file).write_text(json.dumps(content))
        declared = Declared(folder)
        for module in COMMON:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        variables = {name for question in questions for name in question["environment"]}
        if wrong := [*declared.asked, *sorted(reads & variables)]:
            raise AssertionError(f"read or asked for by what COMMON imports: {wrong}")
        answers = _ask_worlds(questions, folder, declared, reads)
    print("\n" + json.dumps([answers[question["name"]] for question in questions]), flush=True)
    os._exit(0)  # tearing torch down takes seconds and tells nothing


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
    questions: list[Facts], folder: Path, declared: Declared, reads: set[str]
) -> dict[str, Facts]:
    """As many worlds at a time as there are cores; the large ones first."""
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
            pid = os.fork()
            if pid == 0:
                _end_after(partial(_write_world, path, group, folder, declared, reads))
            running[pid] = group, path
        pid = _first_ended(running)
        group, path = running.pop(pid)
        status = os.waitpid(pid, 0)[1]
        if status != 0 or not path.exists():
            refused = {"kind": "oracle", "message": f"a world ended with status {status}"}
            answers |= {q["name"]: {"name": q["name"], "refused": refused} for q in group}
            continue
        answers |= {answer["name"]: answer for answer in json.loads(path.read_text())}
        waiting += [[question] for question in group if question["name"] not in answers]
    return answers


def _split(group: list[Facts], parts: int) -> list[list[Facts]]:
    """The questions in so many lists of about the same length."""
    return [part for start in range(parts) if (part := group[start::parts])]


def _write_world(path: Path, *world: Any) -> None:
    path.write_text(json.dumps(_world(*world)))


def _first_ended(pids: Iterable[int]) -> int:
    """One of these children that has ended; libraries have children of their own."""
    files = {os.pidfd_open(pid): pid for pid in pids}
    try:
        return files[select.select(files, (), ())[0][0]]
    finally:
        for file in files:
            os.close(file)


def _end_after(work: Any) -> None:
    """Of a child: do the work and end, whatever happens."""
    status = 1
    try:
        work()
        status = 0
    except BaseException:  # noqa: BLE001 - os._exit would end it without a word
        traceback.print_exc()
    finally:
        os._exit(status)


def _world(
    questions: list[Facts], folder: Path, declared: Declared, reads: set[str]
) -> list[Facts]:
    """One device: import, then a child per question; the first one shows what else to import."""
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
            with contextlib.suppress(Exception):  # it failed for the question as well
                importlib.import_module(name)
    return answers


def _in_child(question: Facts, folder: Path) -> Facts:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as out:
            _end_after(lambda: _write_answer(out, question, folder))
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    if not text:
        refused = {"kind": "oracle", "message": "the process died"}
        return {"name": question["name"], "refused": refused}
    answer: Facts = json.loads(text)
    return answer


def _write_answer(file: TextIO, question: Facts, folder: Path) -> None:
    json.dump(_answer(question, folder), file)
    file.flush()


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
        answer["refused"] = {"kind": "oracle", "message": message}
    answer["imported"] = sorted(set(sys.modules) - before)
    answer["seconds"] = round(time.monotonic() - start, 2)
    return answer


def _architecture(config: Any) -> str:
    """What vLLM makes of the checkpoint's model type for the draft (config/speculative.py)."""
    return str(config.speculative_config.draft_model_config.hf_config.architectures[0])


def _fill(answer: Facts, question: Facts, folder: Path) -> None:
    from . import building, experts, graphs, layers  # noqa: PLC0415 - after the world's imports

    log = attach_log()
    answer["unknown_environment"] = unknown_environment(question["environment"])
    os.environ.update(question["environment"])
    with log.listen() as lines:
        config = make_config(str(folder / question["artifact"]), question["arguments"])
    answer["warnings"] = list(dict.fromkeys(text for level, text in lines if level >= WARNING))
    with importlib.import_module("vllm.config").set_current_vllm_config(config):
        built = building.build(config, log)
        answer["attention"] = layers.attention_facts(config)
        answer["linear"] = layers.linear_facts(config, built.model)
        answer["moe"] = experts.moe_facts(built.model, built.selections, log)
        if built.model is not None:
            answer["modules"] = layers.module_schemes(built.model)
        if built.draft is not None:
            answer["draft"] = {
                "architecture": _architecture(config),
                "speculative_tokens": config.speculative_config.num_speculative_tokens,
                "modules": layers.module_schemes(built.draft),
                "moe": experts.moe_facts(built.draft, built.draft_selections, log),
            }
        if built.refused is not None:
            raise built.refused
        platform: Any = importlib.import_module("vllm.platforms").current_platform
        platform.update_block_size_for_backend(config)
        answer["engine"] = engine_facts(config)
        answer["kv_cache"] = graphs.kv_facts(config)
        answer["cuda_graphs"] = graphs.graph_facts(config, built.model)
    if answer["attention"] is not None and answer["attention"]["error"]:
        raise Refusal("device", answer["attention"]["error"])
