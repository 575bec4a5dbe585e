"""The adapter: the only module of this folder that knows how the product is called.

Cases are written in the words of the first command line. Where a command or an option got another
name since, it is a row here, so that the cases and their golden files stay.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_forge.cli import main
from vllm_forge.host.console import console
from vllm_forge.images import rootfs
from vllm_forge.sources import index

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What a case says -> what the command line says today.
COMMANDS = {
    "lint-presets": "lint",
    "census": "kernels coverage",
    "oracle": "kernels select",
    "patches": "patch check",
    "prove": "patch prove",
    "drift": "patch drift",
    "wheel": "wheels patched",
    "lock": "wheels lock",
    "fetch": "wheels fetch",
    "inspect-checkpoint": "checkpoint inspect",
    "quantize": "checkpoint quantize",
    "tiny": "checkpoint fixtures",
    "test-gpu": "gpu test",
    "gpu-kit": "gpu kit",
    "receipts": "gpu receipts",
}
OPTIONS = {"--recorded": "--replay", "--record": "--save"}
ERROR = re.compile(r"^(\w+) \(exit (\d+)\)$", re.MULTILINE)
WHERE = re.compile(r"^  where:  (.*)$", re.MULTILINE)
MEANINGS = {0: "refused", 1: "red", 2: "undecided", 3: "fault"}
# Check of a checkpoint -> its old number, as golden files have it.
CHECKS = {
    "missing-mtp": "G01",
    "missing-experts": "G05",
    "scale-fmt": "G07",
    "global-scale-shape": "G08",
    "block-scale-name": "G09",
    "targets": "G11",
    "input-activations": "G12",
    "broad-ignore": "G13",
    "draft-not-ignored": "G14",
    "draft-embedding": "G15",
    "draft-format": "G16",
    "split-shared-experts": "G17",
    "stale-ignore": "G18",
    "rounded": "G19",
    "router-bias": "G22",
    "quantized-compressor": "G23",
    "actorder": "G57",
    "nvfp4-scales": "G58",
    "other-drafter": "G69",
    "unequal-global-scales": "w1/w3",
    "bf16-wo_a": "wo_a",
}
SETTINGS = ("UV_", "PIP_", "GIT_", "VLLM_FORGE_", "DOCKER_", "CONTAINER_", "HF_")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left: class of its error ("" without one), the place it names, its output."""

    error: str
    out: str
    err: str
    meaning: str = ""
    where: str = ""

    def verdict(self) -> dict[str, str]:
        """The part that scripts rely on."""
        named = {"error": self.error, "meaning": self.meaning, "where": self.where}
        return {name: value for name, value in named.items() if value}

    def text(self) -> str:
        """The same in a line."""
        meaning = f" ({self.meaning})" if self.meaning else ""
        return f"{self.error}{meaning}: {self.where}" if self.error else "no error"


@contextlib.contextmanager
def environment(root: Path, cache: Path) -> Iterator[None]:
    """A checkout and a cache, none of the host's settings and mirrors, and no index to reach."""
    before, width, retries = dict(os.environ), console.width, index.CONNECT_RETRIES
    for name in before:
        if name.startswith(SETTINGS) or "proxy" in name.lower():
            del os.environ[name]
    os.environ |= {
        "VLLM_FORGE_ROOT": str(root),
        "VLLM_FORGE_CACHE": str(cache),
        "UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple",
        "PIP_CONFIG_FILE": os.devnull,
    }
    console.width = 100_000
    index.CONNECT_RETRIES = 0
    mirrors = rootfs.host_sources
    rootfs.host_sources = lambda suite: "deb https://mirror.example/debian trixie main\n"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        console.width, index.CONNECT_RETRIES = width, retries
        rootfs.host_sources = mirrors


def run(words: str) -> Outcome:
    """Run one command in this process; ``words`` are those of the first command line."""
    command, _, rest = words.partition(" ")
    argv = COMMANDS.get(command, command).split()
    argv += [OPTIONS.get(word, word) for word in shlex.split(rest)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except Exception as error:  # noqa: BLE001 - a traceback is an outcome too
            return Outcome(error=f"traceback: {type(error).__name__}", out="", err="")
    named = ERROR.search(err.getvalue())
    assert (named is not None) == (code != 0), f"{words}: exit {code}\n{err.getvalue()}"
    if "--json" in argv:
        _check_document(words, json.loads(out.getvalue()), named[1] if named else "")
    where = WHERE.search(err.getvalue())
    return Outcome(
        error=named[1] if named else "",
        meaning=_meaning(named[1], code) if named else "",
        where=where[1] if where else "",
        out=out.getvalue(),
        err=err.getvalue(),
    )


def _check_document(words: str, document: Any, error: str) -> None:
    """stdout of --json is one document: the answer, or an error of the class that stderr names."""
    if isinstance(document, dict) and "error" in document:
        assert document["error"]["class"] == error, words


def _meaning(error: str, code: int) -> str:
    """Wrong usage has a code of its own, see vllm_forge.errors."""
    return "usage" if error == "UsageError" else MEANINGS[code % 10]


def parent_of(variant: str) -> str:
    """The variant of the tiny checkpoint that it is a change of; empty for one without."""
    from tests.support.variants import load_variants

    return load_variants()[variant].parent or ""


def plan(sku: str, line: str) -> dict[str, Any]:
    """A cell's plan."""
    result: dict[str, Any] = json.loads(run(f"plan --sku {sku} --line {line} --json").out)
    return result


def build_commands(words: str) -> list[str]:
    """The commands of a dry run; what it says between them are comments."""
    return [line for line in run(f"{words} --dry-run").out.splitlines() if line[:1] != "#"]


def image_keys(root: Path, sku: str, line: str, engine: str) -> dict[str, str]:
    """Keys of an image's layers and system: equal keys, equal bytes."""
    from vllm_forge.images import BuildOptions, choose_engine, resolve
    from vllm_forge.project import Project

    project, options = Project(root), BuildOptions(output=root / "dist")
    resolved = resolve(
        project, project.cell(sku, line), options, choose_engine(engine, dry_run=True)
    )
    keys = {group.name: group.keys for group in resolved.groups} | {"system": [resolved.system_key]}
    return {name: " ".join(key[:16] for key in row) for name, row in keys.items()}


def lint(root: Path, line: str, changes: dict[str, Any]) -> dict[str, list[str]]:
    """Findings on each preset and artifact of a line, after ``changes`` to each preset's row."""
    from vllm_forge.kernels.selection.record import read_selection
    from vllm_forge.project import Project
    from vllm_forge.serve.rules import cases, judge

    project = Project(root)
    rows = {name: row.model_copy(update=changes) for name, row in project.matrix.preset.items()}
    vars(project)["matrix"] = project.matrix.model_copy(update={"preset": rows})
    found: dict[str, list[str]] = {}
    for case in cases(project, read_selection(root / "records", line)):
        key = f"{case.preset_name} {case.artifact_name}"
        found[key] = [finding.what for finding in judge(case)]
    return found


def inspect_rules(words: str) -> dict[str, Any]:
    """An inspection by the matching rules: outcomes, and what was found."""
    ended = run(f"inspect-checkpoint {words} --resolve=rules --json")
    return {**ended.verdict(), **_report(json.loads(ended.out))}


def inspect_loaded(
    root: Path, folder: Path, loads: dict[str, dict[str, Any]]
) -> dict[str, dict[str, str]]:
    """Outcome a line for each of ``loads``: what vLLM's dry load of target and drafts gave."""
    from vllm_forge.checkpoints.inspect.dry_load import Answer
    from vllm_forge.checkpoints.inspect.inspection import inspect
    from vllm_forge.checkpoints.inspect.profile import Profile
    from vllm_forge.matrix import load
    from vllm_forge.patches.dispositions import read_dispositions

    matrix, profile = load(root), Profile.open(folder)
    outcomes = {}
    for name, given in loads.items():
        answer = Answer.model_validate({"target": given, "drafts": {"mtp": given, "dspark": given}})
        report = inspect(
            profile,
            {line: row.vllm for line, row in matrix.line.items()},
            read_dispositions(root / "patches/vllm"),
            dict.fromkeys(matrix.line, answer),
        )
        outcomes[name] = {verdict.line: str(verdict.outcome) for verdict in report.lines}
    return outcomes


def recorded_verdicts(root: Path) -> dict[str, Any]:
    """What records/verdicts.json has of each variant: outcome and checks."""
    record = json.loads((root / "records/verdicts.json").read_text(encoding="utf-8"))
    return {
        name: {
            "artifact": row["artifact"],
            "findings": _findings(row["findings"]),
            "lines": {
                line: [verdict["outcome"], _checks(verdict["checks"])]
                for line, verdict in row["lines"].items()
            },
        }
        for name, row in record["variants"].items()
    }


def _report(report: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: report[key] for key in ("artifact", "drafter", "tensors", "draft_tensors")},
        "parts": [
            f"{'draft ' if row['draft'] else ''}{row['part']}: {row['tensors']}, {row['formats']}"
            for row in report["parts"]
        ],
        "findings": _findings(report["findings"]),
        "lines": {row["line"]: [row["outcome"], _checks(row["checks"])] for row in report["lines"]},
    }


def _findings(rows: list[dict[str, Any]]) -> list[str]:
    """Check and effect of each."""
    return sorted({f"{CHECKS.get(row['check'], row['check'])} {row['effect']}" for row in rows})


def _checks(names: list[str]) -> list[str]:
    return sorted(CHECKS.get(name, name) for name in names)
