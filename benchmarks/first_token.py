"""How long the tiny DeepSeek-V4 takes to its first token, cold and with kernels compiled before.

    python benchmarks/first_token.py LABEL=FOLDER...

FOLDER is what a kit's run brought back, unpacked: ``server.json`` and ``server/boot/dsv4.log``.
Stages are between lines of the boot log. Writes benchmarks/results/first-token.json. Nothing
is run here: the GPU host has run it.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.host import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
RESULT = "benchmarks/results/first-token.json"
ENGINE = "dsv4"
TEST = "tests/gpu/mtp/test_deepseek_v4.py::test_patched_loads_and_drafts[dsv4]"
TIME = re.compile(r"^(?:\(\w+ pid=\d+\) )?(?:INFO|WARNING) (\d\d-\d\d \d\d:\d\d:\d\d)")
# What ends each stage; the first one begins with the process.
STAGES = {
    "imports": "non-default args:",
    "configuration": "Starting to load model",
    "weights": "Model loading took",
    "kernels of the model": "Warming up ll_bf16 router GEMM",
    "kernels that no cache keeps": "Kernel JIT monitor activated",
}


def stages(log: str, whole: float) -> dict[str, float]:
    """Seconds of each stage that the log shows the end of; the imports are what is left."""
    ends: dict[str, datetime] = {}
    for at, row in _rows(log):
        for name, text in STAGES.items():
            if text in row:
                ends.setdefault(name, at)
    names = list(STAGES)
    spans = {
        name: (ends[name] - ends[before]).total_seconds()
        for before, name in pairwise(names)
        if name in ends and before in ends
    }
    if len(spans) == len(names) - 1:
        return {names[0]: round(whole - sum(spans.values()), 1), **spans}
    return spans


def _rows(log: str) -> Iterator[tuple[datetime, str]]:
    """Lines of the log that have a time; it has no year."""
    for row in log.splitlines():
        if found := TIME.match(row):
            yield datetime.strptime(f"2000-{found[1]} +0000", "%Y-%m-%d %H:%M:%S %z"), row


def row(label: str, folder: Path) -> dict[str, Any]:
    """One start."""
    result = json.loads((folder / "server.json").read_text())
    log = (folder / "server" / "boot" / f"{ENGINE}.log").read_text(errors="replace")
    test = result["tests"].get(TEST, {"facts": {}})
    said = test["facts"].get("seconds")
    began, ended = (datetime.fromisoformat(result[name]) for name in ("started", "finished"))
    took = (ended - began).total_seconds()
    return {
        "start": label,
        "gpu": result["gpus"][0]["name"],
        "line": result["plan"]["line"],
        "compiled_before": test["facts"].get("compiled_before"),
        "first_token": round(said["first token"], 1) if said else None,
        "stages": stages(log, said["ready"]) if said else {},
        "ended": None if said else f"none in the run's {took:.0f} s",
        "date": result["finished"],
    }


def main(arguments: list[str]) -> None:
    """Write the result of the given runs; rows with other labels stay."""
    pairs = [argument.partition("=") for argument in arguments]
    if not pairs or not all(folder for _, _, folder in pairs):
        sys.exit(__doc__)
    rows = {kept["start"]: kept for kept in json.loads((ROOT / RESULT).read_text())["rows"]}
    rows |= {label: row(label, Path(folder)) for label, _, folder in pairs}
    result = {"rows": list(rows.values())}
    with atomic_path(ROOT / RESULT) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
