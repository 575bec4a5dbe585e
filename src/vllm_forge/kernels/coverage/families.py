"""The rows of families.toml: kernel families, which backend needs which, and exceptions."""

import hashlib
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from vllm_forge.host import suggestion
from vllm_forge.kernels.coverage.target import Capability
from vllm_forge.kernels.errors import UnknownFamilyError
from vllm_forge.matrix import FrozenModel

DATA = files("vllm_forge.kernels.coverage") / "families.toml"
# Best first; a family is as good as the worst of its parts. The first three need no exception.
CoverageVerdict: TypeAlias = Literal["native", "family", "source", "ptx", "download", "missing"]
VERDICTS: tuple[CoverageVerdict, ...] = ("native", "family", "source", "ptx", "download", "missing")
FINE: tuple[CoverageVerdict, ...] = ("native", "family", "source")


class FamilyPart(FrozenModel):
    """A part of a family that must be there, on the GPUs and lines that it is for."""

    majors: tuple[int, ...] = Field(default=(), description="of the compute capability; (): all")
    lines: tuple[str, ...] = Field(default=(), description="(): all")

    def applies(self, capability: Capability, line: str) -> bool:
        """Whether it is for that GPU on that line."""
        return (not self.majors or capability[0] in self.majors) and (
            not self.lines or line in self.lines
        )


class Kernels(FamilyPart):
    """Kernels that are compiled into a library."""

    libraries: tuple[str, ...] = Field(min_length=1, description="globs; one has the kernels")
    match: Annotated[str, AfterValidator(lambda text: re.compile(text).pattern)] = Field(
        description="regular expression, searched for in the mangled names"
    )


class Libraries(FamilyPart):
    """Libraries that must have some code for the GPU."""

    paths: tuple[str, ...] = Field(min_length=1, description="globs; each matches a file")


class Sources(FamilyPart):
    """Kernels that the image compiles on first use."""

    files: tuple[str, ...] = Field(min_length=1, description="globs; each matches a file")
    compiler: str


class Cubins(FamilyPart):
    """Kernels as files of their own."""

    files: str = Field(description="glob")
    fetcher: str = Field(description="what downloads them at run time where they are not there")


class Family(FrozenModel):
    """Kernels that come and go together."""

    what: str = Field(min_length=10)
    fix: str = Field(min_length=20, description="what would help where it is missing")
    kernels: tuple[Kernels, ...] = ()
    libraries: tuple[Libraries, ...] = ()
    sources: tuple[Sources, ...] = ()
    cubins: tuple[Cubins, ...] = ()

    @property
    def parts(self) -> tuple[Kernels | Libraries | Sources | Cubins, ...]:
        return (*self.kernels, *self.libraries, *self.sources, *self.cubins)


class Compiler(FrozenModel):
    """A compiler of the image."""

    files: tuple[str, ...] = Field(description="globs; each matches a file")
    targets: str = Field(description="glob; one of the files names the targets it compiles for")


class Need(FrozenModel):
    """Which families a selection of vLLM's needs."""

    always: tuple[str, ...]
    attention: dict[str, tuple[str, ...]] = Field(description="attention backend -> families")
    linear: dict[str, tuple[str, ...]] = Field(description="kernel class -> families")
    modules: dict[str, tuple[str, ...]] = Field(description="scheme class -> families")
    experts: dict[str, dict[str, tuple[str, ...]]] = Field(
        description="scheme class of routed experts -> backend -> families"
    )

    def families(self) -> set[str]:
        tables = (self.attention, self.linear, self.modules, *self.experts.values())
        return {*self.always, *(name for table in tables for row in table.values() for name in row)}


class Exemption(FrozenModel):
    """A verdict that is accepted although the code is not in the image."""

    family: str
    verdict: Literal["ptx", "download", "missing"]
    lines: tuple[str, ...] = Field(min_length=1)
    capabilities: tuple[Annotated[str, Field(pattern=r"^\d+\.\d$")], ...] = Field(min_length=1)
    reason: str = Field(min_length=40)


class Catalogue(FrozenModel):
    compiler: dict[str, Compiler]
    family: dict[str, Family]
    need: Need
    exception: tuple[Exemption, ...] = ()

    @model_validator(mode="after")
    def _references(self) -> Self:
        for name in (*self.need.families(), *(row.family for row in self.exception)):
            if name not in self.family:
                raise ValueError(f"no [family.{name}]{suggestion(name, self.family)}")
        for name, family in self.family.items():
            if not family.parts:
                raise ValueError(f"family.{name} has no part")
            for part in family.sources:
                if part.compiler not in self.compiler:
                    raise ValueError(f"family.{name}: no [compiler.{part.compiler}]")
        return self

    def patterns_of(self, library: str) -> list[str]:
        """The patterns to look for in a library, by its path below site-packages."""
        path = PurePosixPath("/", library)
        return sorted(
            {
                part.match
                for family in self.family.values()
                for part in family.kernels
                if any(path.match(f"/{glob}") for glob in part.libraries)
            }
        )


@cache
def catalogue() -> Catalogue:
    return Catalogue.model_validate(tomllib.loads(DATA.read_text(encoding="utf-8")))


def digest() -> str:
    return hashlib.sha256(DATA.read_bytes()).hexdigest()


def needed(table: dict[str, tuple[str, ...]], chosen: str, what: str) -> tuple[str, ...]:
    """The families of the backend that vLLM chose, by a table of Need; ``what`` for the message."""
    if chosen not in table:
        raise UnknownFamilyError(
            f"missing row for {what} {chosen!r}{suggestion(chosen, table)}",
            where="src/vllm_forge/kernels/coverage/families.toml, [need]",
            remedy="add a row with the families it needs",
        )
    return table[chosen]


def worst(verdicts: Iterable[CoverageVerdict]) -> CoverageVerdict:
    return max(verdicts, key=VERDICTS.index)
