"""Kernel families, the rows of families.toml, and how the files of an image cover them.

By native code, by sources with a compiler of the image, by code to download, or not at all.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import AfterValidator, Field, model_validator

from vllm_forge.host import suggestion
from vllm_forge.kernels.coverage import library
from vllm_forge.kernels.coverage.device_code import Capability, Kind, Target, runs_on
from vllm_forge.matrix import FrozenModel

DATA = files("vllm_forge.kernels.coverage") / "families.toml"
# Best first; a family is as good as the worst of its parts. The first three need no exception.
CoverageVerdict: TypeAlias = Literal["native", "family", "source", "ptx", "download", "missing"]
AT_START = "needs network at first start"  # what "download" means for an image
VERDICTS: tuple[CoverageVerdict, ...] = ("native", "family", "source", "ptx", "download", "missing")
FINE: tuple[CoverageVerdict, ...] = ("native", "family", "source")


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """A family, or a part of one, on a GPU."""

    verdict: CoverageVerdict
    codes: tuple[str, ...]  # what it runs as, e.g. 100f, 80 PTX, nvcc; empty if it is missing
    detail: str


def _missing(detail: str) -> Coverage:
    return Coverage(verdict="missing", codes=(), detail=detail)


class FamilyPart(FrozenModel):
    """A part of a family that must be there, on the GPUs and lines that it is for."""

    majors: tuple[int, ...] = ()  # of the compute capability; (): all
    lines: tuple[str, ...] = ()  # (): all

    def applies(self, capability: Capability, line: str) -> bool:
        here = not self.majors or capability[0] in self.majors
        return here and (not self.lines or line in self.lines)


class Kernels(FamilyPart):
    """Kernels that are compiled into a library."""

    libraries: tuple[str, ...] = Field(min_length=1)  # globs; one has the kernels
    # A regular expression, searched for in the mangled names.
    match: Annotated[str, AfterValidator(lambda text: re.compile(text).pattern)]

    def coverage(self, contents: SitePackages, capability: Capability) -> Coverage:
        """Each kernel of the pattern must have a body; the worst one counts."""
        groups = [
            (name, group, *best(group.code, capability))
            for glob in self.libraries
            for name, path in contents.find(glob)
            for group in contents.library(name, path).patterns.get(self.match, ())
        ]
        if not groups:
            return _missing(f"no such kernel in {', '.join(self.libraries)}")
        verdict = worst(row[2] for row in groups)
        least = [row for row in groups if row[2] == verdict]
        count = sum(group.kernels for _, group, _, _ in least)
        total = sum(group.kernels for _, group, _, _ in groups)
        which = f"{count} of {total} kernels"
        if verdict == "missing":
            has = ", ".join(sorted({code for _, group, _, _ in least for code in group.code}))
            detail = f"{which} have no code for it in {least[0][0]}: only {has}"
        else:
            codes = ", ".join(dict.fromkeys(code for *_, code in least))
            detail = f"{which} in {least[0][0]} run as {codes}"
        shown = tuple(dict.fromkeys(code for *_, code in groups if code))
        return Coverage(verdict=verdict, codes=shown, detail=detail)


class Libraries(FamilyPart):
    """Libraries that must have some code for the GPU."""

    paths: tuple[str, ...] = Field(min_length=1)  # globs; each matches a file

    def coverage(self, contents: SitePackages, capability: Capability) -> Coverage:
        files = {glob: contents.find(glob) for glob in self.paths}
        ways = {
            name: best(tuple(contents.library(name, path).code), capability)
            for rows in files.values()
            for name, path in rows
        }
        missing = [f"no {glob}" for glob, rows in files.items() if not rows]
        missing += [f"{name} has no code for it" for name, (_, code) in ways.items() if not code]
        verdict: CoverageVerdict = "missing"
        if not missing:
            verdict = worst(row for row, _ in ways.values())
        codes = tuple(dict.fromkeys(code for _, code in ways.values() if code))
        detail = "; ".join(missing) or f"the libraries have {', '.join(codes)}"
        return Coverage(verdict=verdict, codes=codes, detail=detail)


class Sources(FamilyPart):
    """Kernels that the image compiles on first use."""

    files: tuple[str, ...] = Field(min_length=1)  # globs; each matches a file
    compiler: str

    def coverage(self, contents: SitePackages, capability: Capability) -> Coverage:
        compiler = contents.rows.compiler[self.compiler]
        missing = [glob for glob in (*self.files, *compiler.files) if not contents.find(glob)]
        if missing:
            return _missing(f"not there: {', '.join(missing)}")
        target = f"sm_{Target(*capability, 'a')}"
        if not any(contents.knows(path, target) for _, path in contents.find(compiler.targets)):
            return _missing(f"{self.compiler} of this image does not know {target}")
        detail = f"compiled by {self.compiler} on first use"
        return Coverage(verdict="source", codes=(self.compiler,), detail=detail)


class Cubins(FamilyPart):
    """Kernels as files of their own."""

    files: str  # glob
    fetcher: str  # what downloads them at run time where they are not there

    def coverage(self, contents: SitePackages, capability: Capability) -> Coverage:
        files = contents.find(self.files)
        targets = {target for _, path in files if (target := contents.cubin_target(path))}
        names = [str(target) for target in sorted(targets)]
        verdict, code = best([f"cubin {name}" for name in names], capability)
        if verdict != "missing":
            detail = f"{len(files)} cubins, run as {code}"
            return Coverage(verdict=verdict, codes=(code,), detail=detail)
        if not files and contents.find(self.fetcher):
            detail = f"no cubins in the image: {self.fetcher} downloads them at the first start"
            return Coverage(verdict="download", codes=("network",), detail=detail)
        return _missing(f"{len(files)} cubins for {', '.join(names) or 'nothing'}")


class Family(FrozenModel):
    """Kernels that come and go together."""

    what: str = Field(min_length=10)
    fix: str = Field(min_length=20)  # what would help where it is missing
    kernels: tuple[Kernels, ...] = ()
    libraries: tuple[Libraries, ...] = ()
    sources: tuple[Sources, ...] = ()
    cubins: tuple[Cubins, ...] = ()

    @property
    def parts(self) -> tuple[Kernels | Libraries | Sources | Cubins, ...]:
        return (*self.kernels, *self.libraries, *self.sources, *self.cubins)


class Compiler(FrozenModel):
    files: tuple[str, ...]  # globs; each matches a file
    targets: str  # glob; one of the files names the targets it compiles for


class Need(FrozenModel):
    """Which families a selection of vLLM's needs."""

    always: tuple[str, ...]
    attention: dict[str, tuple[str, ...]]  # attention backend -> families
    linear: dict[str, tuple[str, ...]]  # kernel class -> families
    modules: dict[str, tuple[str, ...]]  # scheme class -> families
    experts: dict[str, dict[str, tuple[str, ...]]]  # scheme class -> backend -> families

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
    def _references(self) -> Catalogue:
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
        parts = [part for family in self.family.values() for part in family.kernels]
        return sorted({p.match for p in parts if any(path.match(f"/{g}") for g in p.libraries)})


@cache
def catalogue() -> Catalogue:
    return Catalogue.model_validate(tomllib.loads(DATA.read_text(encoding="utf-8")))


def digest() -> str:
    return hashlib.sha256(DATA.read_bytes()).hexdigest()


def worst(verdicts: Iterable[CoverageVerdict]) -> CoverageVerdict:
    return max(verdicts, key=VERDICTS.index)


class SitePackages:
    """The site-packages folders of an image, lowest layer first; each file is read once."""

    carried = False  # whether FlashInfer's archives are in one of the folders

    def __init__(self, sites: tuple[Path, ...], rows: Catalogue | None = None) -> None:
        self.sites, self.rows = sites, rows or catalogue()
        self.find, self.library = cache(self._find), cache(self._library)
        self.knows, self.cubin_target = cache(_knows), cache(_cubin_target)

    def _find(self, glob: str) -> list[tuple[str, Path]]:
        """Path below site-packages and real path of each file; an upper layer hides a lower one."""
        merged = {
            path.relative_to(site).as_posix(): path
            for site in self.sites
            for path in site.glob(glob)
            if path.is_file()
        }
        return sorted(merged.items())

    def _library(self, name: str, path: Path) -> library.LibraryCode:
        return library.library_code(path, self.rows.patterns_of(name))

    def libraries(self) -> dict[str, dict[str, Any]]:
        """Every library with device code: its size, and bytes per target, by path."""
        return {
            name: {"size": path.stat().st_size, "code": dict(code)}
            for name, path in self.find("**/*.so*")
            if not path.is_symlink() and (code := self.library(name, path).code)
        }

    def coverage(self, name: str, capability: Capability, line: str) -> Coverage | None:
        """A family on a GPU; None if none of its parts concern that GPU."""
        parts = [
            part.coverage(self, capability)
            for part in self.rows.family[name].parts
            if part.applies(capability, line)
        ]
        if not parts:
            return None
        verdict = worst(part.verdict for part in parts)
        shown = parts if verdict in FINE else [part for part in parts if part.verdict == verdict]
        codes = sorted({code for part in shown for code in part.codes})
        details = dict.fromkeys(part.detail for part in shown)
        return Coverage(verdict=verdict, codes=tuple(codes), detail="; ".join(details))


def _knows(path: Path, target: str) -> bool:
    word = re.compile(re.escape(target.encode()) + rb"(?![0-9A-Za-z])")
    with library.mapped(path) as buffer:
        return word.search(buffer) is not None


def _cubin_target(path: Path) -> Target | None:
    with library.mapped(path) as buffer:
        return library.compiled_for(buffer, str(path))


def best(code: Sequence[str], capability: Capability) -> tuple[CoverageVerdict, str]:
    """How code such as ``cubin 120f`` runs on a GPU at best, and what runs.

    That is e.g. ``120f`` or ``80 PTX``; "" if nothing does.
    """
    ways: list[tuple[int, Capability, CoverageVerdict, str]] = []
    for text in code:
        kind, _, name = text.partition(" ")
        target = Target.parse(name)
        if not runs_on(target, cast("Kind", kind), capability):
            continue
        verdict: CoverageVerdict = "ptx"
        if kind == "cubin":
            verdict = "family" if target.suffix == "f" else "native"
        shown = name if kind == "cubin" else f"{name} {kind.upper()}"
        ways.append((-VERDICTS.index(verdict), target.capability, verdict, shown))
    return max(ways, key=lambda way: way[:2])[2:] if ways else ("missing", "")
