"""What a rehearsal answers, computed from its embedding, final norm and head alone.

Experts and attention add zeros. Hyper-connections spread the embedding over streams, mix these with
weights whose columns add up to one, and collapse them with positive weights (vLLM 0.26.0,
model_executor/kernels/mhc/torch.py:60-90, models/deepseek_v4/nvidia/model.py:1067-1145): all are
multiples of the embedding, and the final norm takes the factor away.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

EMBEDDING, NORM, HEAD = "embed.weight", "norm.weight", "head.weight"
ROWS = 8192  # of embedding and head that are drawn; the logits of other tokens are zero


class Expected:
    """Next tokens of the checkpoint in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = (folder / "model.safetensors.index.json").read_text(encoding="utf-8")
        self.shards: dict[str, str] = json.loads(text)["weight_map"]

    @cached_property
    def embedding(self) -> NDArray[np.float32]:
        return self._rows(EMBEDDING)[0]

    @cached_property
    def head(self) -> tuple[NDArray[np.float32], int]:
        """Drawn rows, with the final norm's weights, and how many other rows there are."""
        rows, count = self._rows(HEAD)
        return rows * self._rows(NORM)[0], count - len(rows)

    def log_probabilities(self, token: int) -> NDArray[np.float64]:
        """Of each token that has a drawn row in the head."""
        hidden = self.embedding[token].astype(np.float64)
        head, zeros = self.head
        logits = head @ (hidden / np.sqrt(np.mean(hidden**2))).astype(np.float32)
        top = max(float(logits.max()), 0.0)
        total = np.exp(logits.astype(np.float64) - top).sum() + zeros * np.exp(-top)
        return np.asarray(logits - top - np.log(total), dtype=np.float64)

    def _rows(self, name: str) -> tuple[NDArray[np.float32], int]:
        """The first rows of a BF16 tensor, and how many it has."""
        with (self.folder / self.shards[name]).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            row = json.loads(file.read(size))[name]
            count, *width = row["shape"]
            drawn = min(count, ROWS)
            file.seek(8 + size + row["data_offsets"][0])
            data = file.read(2 * drawn * int(np.prod(width)))
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).reshape(drawn, *width), count
