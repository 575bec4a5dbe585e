"""What ``rows.toml`` says."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start on the declared card; without ``says`` it serves."""

    utilization: float
    requested_gib: float
    verdict: str  # of doctor
    says: str = ""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Arguments that vLLM refuses, and the words of both sides."""

    name: str
    arguments: Sequence[str]
    config: Mapping[str, Any]
    says: str
    foretold: str


ROWS: dict[str, Any] = tomllib.loads((Path(__file__).parent / "rows.toml").read_text("utf-8"))
CARD, GRAPHS, SOAK = ROWS["card"], ROWS["graphs"], ROWS["soak"]
REFUSED, SERVED = Start(**CARD["refused"]), Start(**CARD["served"])
REFUSALS = tuple(Refusal(**row) for row in ROWS["refusal"])
FULL_BATCH = GRAPHS["sequences"] * GRAPHS["tokens_per_sequence"]


def arguments(start: Start, total: int) -> list[str]:
    """Of ``vllm serve`` on a GPU of ``total`` bytes, which takes no more than the card would.

    vLLM takes ``total_memory * utilization`` for itself (0.26.0, v1/worker/utils.py:430).
    """
    sequences = "--max-num-seqs="
    words = [word for word in CARD["arguments"] if not word.startswith(sequences)]
    return [
        *words,
        f"{sequences}{GRAPHS['sequences']}",
        f"--gpu-memory-utilization={start.utilization * fraction(total):.6f}",
        "--cudagraph-metrics",
        "--cudagraph-capture-sizes", *map(str, GRAPHS["sizes"]),
    ]  # fmt: skip


def fraction(total: int) -> float:
    """Of the card's memory in that of a GPU."""
    return float((CARD["mib"] << 20) / total)


def allocator(total: int) -> dict[str, str]:
    """Variables by which no process allocates more than the card has.

    torch 2.11.0, include/c10/cuda/CUDAAllocatorConfig.h:65.
    """
    return {"PYTORCH_CUDA_ALLOC_CONF": f"per_process_memory_fraction:{fraction(total):.4f}"}
