"""Workloads of benchmarks/sessions, and the checkpoint of the model that is known exactly.

python -m tests.support.sessions DIR      write the workloads there, and the checkpoint to DIR
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.gpu.models import exact_mtp
from tests.gpu.mtp.engines import VOCABULARY, last

if TYPE_CHECKING:
    from collections.abc import Iterable

FOLDER = Path(__file__).parents[2] / "benchmarks" / "sessions"
SEED = 20261130
TINY, LENGTH = 72, 32  # prompts, and tokens of each
EXACT, WARM, TOKENS, K = 32, 4, 64, 2  # measured prompts; the rest is that of exact-mtp.toml
SERVER = "tests.support.answer_server"
VARIANT: exact_mtp.Variant = "fraction"


def tiny() -> bytes:
    """Prompts of token ids."""
    source = random.Random(SEED)  # noqa: S311 - not a secret
    return lines(
        {"item": f"t{n}", "prompt": [source.randrange(8, VOCABULARY) for _ in range(LENGTH)]}
        for n in range(TINY)
    )


def exact() -> bytes:
    """Two tokens each (MiMo's head masks the first position), and what must be counted."""
    rows: list[dict[str, object]] = []
    for number in range(WARM + EXACT):
        counts = exact_mtp.expected(VARIANT, last(number), TOKENS, K)
        predicted = {K: {"drafts": counts.drafts, "per_position": counts.per_position}}
        rows.append({"item": f"x{number}", "prompt": [200 + number, last(number)],
                     "predicted": predicted})  # fmt: skip
    return lines(rows)


def lines(rows: Iterable[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()


def write_exact(folder: Path) -> Path:
    """The checkpoint."""
    return exact_mtp.write(folder, VARIANT)


def write_quality(folder: Path, port: int, env: dict[str, str], *, checkpoint: str) -> Path:
    """A session that asks four questions of `answer_server`, twice, and their data."""
    data = lines(
        {"item": f"q{n}", "prompt": f"question {n}", "answer": f"word-{n}"} for n in range(4)
    )
    (folder / "own.data.jsonl").write_bytes(data)
    digest, argv = hashlib.sha256(data).hexdigest(), ["python3", "-m", SERVER, str(port)]
    variables = ", ".join(f"{name} = {json.dumps(value)}" for name, value in env.items())
    path = folder / "quality.toml"
    path.write_text(f"""session = "december"
starts = 2
checkpoint = "{checkpoint}"
concurrency = [2]
port = {port}

[quality]
workload = "own"
data = "own.data.jsonl"
sha256 = "{digest}"
license = "CC0"

[arm.mtp]
command = {json.dumps(argv)}
model = "m"
env = {{ {variables} }}
""")
    return path


WORKLOADS = {"tiny.jsonl": tiny, "exact.jsonl": exact}

if __name__ == "__main__":
    for name, make in WORKLOADS.items():
        (FOLDER / name).write_bytes(make())
    write_exact(Path(sys.argv[1]))
