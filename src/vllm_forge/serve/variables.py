"""Environment variables that are not vLLM's, the rows of variables.toml: who reads them."""

import tomllib
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files

from vllm_forge.host import suggestion
from vllm_forge.matrix import FrozenModel

DATA = files("vllm_forge.serve") / "variables.toml"
PREFIX = "VLLM_"
# One wrong, missing, additional or swapped letter.
TYPO = 0.93


class Reader(FrozenModel):
    """A library, and the variables that it reads."""

    name: str
    package: str  # and its version
    patterns: tuple[str, ...]  # of names, which it reads or may read
    places: dict[str, tuple[str, ...]]  # where it reads variables -> their names


@cache
def readers() -> tuple[Reader, ...]:
    rows = tomllib.loads(DATA.read_text(encoding="utf-8"))["reader"]
    return tuple(Reader.model_validate(row) for row in rows)


@cache
def places() -> dict[str, str]:
    """Variable -> who reads it and where."""
    return {
        name: f"{reader.name}, {reader.package}: {place}"
        for reader in readers()
        for place, names in reader.places.items()
        for name in names
    }


def doubt(name: str) -> str:
    """What is doubtful about a variable; "" if its reader is known, and for vLLM's own."""
    if name.startswith(PREFIX) or name in places():
        return ""
    if near := suggestion(name, places(), least=TYPO, listed=False):
        return f"unknown variable {name}{near}"
    if any(fnmatchcase(name, pattern) for reader in readers() for pattern in reader.patterns):
        return ""
    return f"unknown variable {name}: no library of the image is known to read it"
