"""Hidden states between two layers, on disk: one sample after the other, nothing else."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.checkpoints.errors import ResumeError
from vllm_forge.host import atomic_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


@dataclass(frozen=True)
class Hidden:
    """A file of hidden states.

    Attributes:
        path: the file.
        tokens: ids of each sample; their numbers say where a sample begins.
        token_bytes: what one token takes: streams x hidden size x 2 (BF16).
    """

    path: Path
    tokens: Sequence[Sequence[int]]
    token_bytes: int

    def read(self, sample: int) -> bytearray:
        """The states of one sample.

        Raises:
            ResumeError: the file has not the size that the tokens say.
        """
        start = sum(len(row) for row in self.tokens[:sample]) * self.token_bytes
        data = bytearray(len(self.tokens[sample]) * self.token_bytes)
        with self.path.open("rb") as file:
            file.seek(start)
            if file.readinto(data) != len(data):
                raise ResumeError(f"sample {sample} is cut off", where=str(self.path))
        return data

    @classmethod
    @contextmanager
    def write(
        cls, path: Path, tokens: Sequence[Sequence[int]], token_bytes: int
    ) -> Iterator[Callable[[bytes], None]]:
        """Yield what takes the states of each sample in turn; the file appears when all are in.

        Raises:
            ValueError: more or fewer bytes than the tokens say.
        """
        with atomic_path(path) as aside, aside.open("wb") as file:
            yield lambda data: (file.write(data), None)[1]
            file.flush()
            os.fsync(file.fileno())
            if file.tell() != sum(len(row) for row in tokens) * token_bytes:
                raise ValueError(f"{path.name}: {file.tell()} bytes of hidden states")
