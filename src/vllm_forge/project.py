"""The checkout that a command works on; made once, in ``cli.main``."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from vllm_forge.host import read_data
from vllm_forge.matrix import ImageCell, Line, Matrix, find_root, image_cell, load
from vllm_forge.matrix.cells import PACKAGED, find_line
from vllm_forge.matrix.errors import CheckoutMissingError, RecordFileError
from vllm_forge.sources import Index, Lock, read_lock


@dataclass(frozen=True)
class Project:
    """A checkout and its rows; ``root`` is the folder with matrix.toml."""

    root: Path

    @classmethod
    def find(cls) -> Self:
        return cls(find_root())

    def require_checkout(self, command: str) -> None:
        """Raise unless this is a checkout: nothing is written to the data of a wheel."""
        if self.root == PACKAGED:
            what = f"{command} needs a checkout of vllm-forge, and there is none here"
            remedy = "run it inside a checkout, or set VLLM_FORGE_ROOT to one"
            raise CheckoutMissingError(what, where=Path.cwd(), remedy=remedy)

    @cached_property
    def matrix(self) -> Matrix:
        """matrix.toml, parsed once."""
        return load(self.root)

    @cached_property
    def index(self) -> Index:
        return Index()

    @property
    def records(self) -> Path:
        """Folder of what the program writes for itself to read later."""
        return self.root / "records"

    def read_json(self, path: str, parse: Callable[[Any], Any] = lambda data: data) -> Any:
        """What ``parse`` makes of a committed JSON file, else RecordFileError."""
        remedy = f"restore it: git checkout -- {path}"
        return read_data(self.root / path, parse, RecordFileError, what="record", remedy=remedy)

    def cell(self, sku: str, line: str | None = None) -> ImageCell:
        """A SKU (or arch) and a line (default: the matrix's)."""
        return image_cell(self.matrix, sku, line)

    def line(self, name: str | None = None) -> tuple[str, Line]:
        """Name and row of a line (default: the matrix's)."""
        return find_line(self.matrix, name)

    def lock(self, name: str) -> Lock:
        return read_lock(self.root, name, self.matrix.line[name], self.matrix.base)

    def lines(self, name: str | None = None) -> list[str]:
        return list(self.matrix.line) if name is None else [self.line(name)[0]]
