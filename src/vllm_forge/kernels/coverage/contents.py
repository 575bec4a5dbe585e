"""What an image holds for each kernel family: native code, sources with a compiler, or nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.kernels.coverage.families import (
    FINE,
    VERDICTS,
    Catalogue,
    Cubins,
    Kernels,
    Libraries,
    Part,
    Sources,
    Verdict,
    catalogue,
    worst,
)
from vllm_forge.kernels.coverage.kernels import compiled_for
from vllm_forge.kernels.coverage.library import census, mapped
from vllm_forge.kernels.coverage.target import Target, runs_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.kernels.coverage.families import Compiler
    from vllm_forge.kernels.coverage.library import LibraryCensus
    from vllm_forge.kernels.coverage.target import Capability, Kind


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """A family on a GPU.

    Attributes:
        verdict: of its worst part.
        codes: what it runs as, e.g. ``100f``, ``80 PTX``, ``nvcc``; empty where it is missing.
        detail: one sentence for people.
    """

    verdict: Verdict
    codes: tuple[str, ...]
    detail: str


@dataclass(frozen=True)
class Contents:
    """The site-packages folders of an image, lowest layer first."""

    sites: tuple[Path, ...]
    rows: Catalogue = field(default_factory=catalogue)
    _seen: dict[Path, LibraryCensus] = field(default_factory=dict)
    _found: dict[str, list[tuple[str, Path]]] = field(default_factory=dict)
    _compilers: dict[tuple[str, str], bool] = field(default_factory=dict)
    _cubin_targets: dict[str, set[Target]] = field(default_factory=dict)

    def find(self, glob: str) -> list[tuple[str, Path]]:
        """Path below site-packages, and place, of each file; an upper layer hides a lower one."""
        if glob not in self._found:
            merged = {
                path.relative_to(site).as_posix(): path
                for site in self.sites
                for path in site.glob(glob)
                if path.is_file()
            }
            self._found[glob] = sorted(merged.items())
        return self._found[glob]

    def census(self, name: str, path: Path) -> LibraryCensus:
        """The census of one library, by the patterns of every family."""
        if path not in self._seen:
            self._seen[path] = census(path, self.rows.patterns_of(name))
        return self._seen[path]

    def coverage(self, name: str, capability: Capability, line: str) -> Coverage | None:
        """A family on a GPU; None where none of its parts concern that GPU.

        Raises:
            UnknownFatbinError: a library's device code cannot be understood.
        """
        family = self.rows.family[name]
        found = [
            self._part(part, capability) for part in family.parts if part.applies(capability, line)
        ]
        if not found:
            return None
        verdict = worst(item.verdict for item in found)
        shown = found if verdict in FINE else [item for item in found if item.verdict == verdict]
        codes = sorted({code for item in shown for code in item.codes})
        details = dict.fromkeys(item.detail for item in shown)
        return Coverage(verdict=verdict, codes=tuple(codes), detail="; ".join(details))

    def _part(self, part: Part, capability: Capability) -> Coverage:
        match part:
            case Kernels():
                return self._kernels(part, capability)
            case Libraries():
                return self._libraries(part, capability)
            case Sources():
                return self._sources(part, capability)
            case Cubins():
                return self._cubins(part, capability)
        raise TypeError(part)

    def _kernels(self, part: Kernels, capability: Capability) -> Coverage:
        """Each kernel of the pattern must have a body; the worst one counts."""
        groups = [
            (name, group)
            for glob in part.libraries
            for name, path in self.find(glob)
            for group in self.census(name, path).patterns.get(part.match, ())
        ]
        where = ", ".join(part.libraries)
        if not groups:
            return Coverage(verdict="missing", codes=(), detail=f"no such kernel in {where}")
        judged = [(name, group, best(group.code, capability)) for name, group in groups]
        verdict = worst(item[2][0] for item in judged)
        least = [item for item in judged if item[2][0] == verdict]
        count = sum(group.kernels for _, group, _ in least)
        total = sum(group.kernels for _, group in groups)
        codes = tuple(dict.fromkeys(code for _, _, (_, code) in judged if code))
        if verdict == "missing":
            has = ", ".join(sorted({code for _, group, _ in least for code in group.code}))
            detail = f"{count} of {total} kernels have no code for it in {least[0][0]}: only {has}"
        else:
            as_what = ", ".join(dict.fromkeys(code for _, _, (_, code) in least))
            detail = f"{count} of {total} kernels in {least[0][0]} run as {as_what}"
        return Coverage(verdict=verdict, codes=codes, detail=detail)

    def _libraries(self, part: Libraries, capability: Capability) -> Coverage:
        verdicts: list[Verdict] = []
        codes: list[str] = []
        lacking: list[str] = []
        for glob in part.paths:
            found = self.find(glob)
            if not found:
                verdicts.append("missing")
                lacking.append(f"no {glob}")
            for name, path in found:
                verdict, code = best(tuple(self.census(name, path).code), capability)
                verdicts.append(verdict)
                codes.append(code)
                if verdict == "missing":
                    lacking.append(f"{name} has no code for it")
        verdict = worst(verdicts)
        shown = tuple(dict.fromkeys(code for code in codes if code))
        detail = "; ".join(lacking) or f"the libraries have {', '.join(shown)}"
        return Coverage(verdict=verdict, codes=shown, detail=detail)

    def _sources(self, part: Sources, capability: Capability) -> Coverage:
        compiler = self.rows.compiler[part.compiler]
        lacking = [glob for glob in (*part.files, *compiler.files) if not self.find(glob)]
        target = f"sm_{Target(*capability, 'a')}"
        if lacking:
            return Coverage(verdict="missing", codes=(), detail=f"not there: {', '.join(lacking)}")
        if not self._compiles_for(compiler, target):
            return Coverage(
                verdict="missing",
                codes=(),
                detail=f"{part.compiler} of this image does not know {target}",
            )
        return Coverage(
            verdict="source",
            codes=(part.compiler,),
            detail=f"compiled by {part.compiler} on first use",
        )

    def _compiles_for(self, compiler: Compiler, target: str) -> bool:
        """Whether one of the compiler's files has the target's name as a word of its own."""
        key = (compiler.targets, target)
        if key not in self._compilers:
            self._compilers[key] = any(
                _mentions(path, target) for _, path in self.find(compiler.targets)
            )
        return self._compilers[key]

    def _cubins(self, part: Cubins, capability: Capability) -> Coverage:
        found = self.find(part.files)
        if part.files not in self._cubin_targets:
            self._cubin_targets[part.files] = {
                target for _, path in found if (target := _cubin_target(path))
            }
        targets = self._cubin_targets[part.files]
        code = tuple(f"cubin {target}" for target in sorted(targets))
        verdict, shown = best(code, capability)
        if verdict != "missing":
            return Coverage(
                verdict=verdict, codes=(shown,), detail=f"{len(found)} cubins, run as {shown}"
            )
        if not found and self.find(part.fetcher):
            return Coverage(
                verdict="download",
                codes=("network",),
                detail=f"no cubins in the image: {part.fetcher} downloads them at the first start",
            )
        return Coverage(
            verdict="missing",
            codes=(),
            detail=f"{len(found)} cubins for {', '.join(map(str, sorted(targets))) or 'nothing'}",
        )


def _mentions(path: Path, word: str) -> bool:
    with mapped(path) as buffer:
        at = buffer.find(word.encode())
        while at >= 0:
            if not buffer[at + len(word) : at + len(word) + 1].isalnum():
                return True
            at = buffer.find(word.encode(), at + 1)
    return False


def _cubin_target(path: Path) -> Target | None:
    with mapped(path) as buffer:
        return compiled_for(buffer)


def best(code: Sequence[str], capability: Capability) -> tuple[Verdict, str]:
    """How code runs on a GPU, at best: as machine code, or compiled by the driver.

    Args:
        code: e.g. ``cubin 120f`` or ``ptx 80``.
        capability: of the GPU.

    Returns:
        The verdict, and what runs, e.g. ``120f`` or ``80 PTX``; "" where nothing does.
    """
    ways: list[tuple[int, Target, Verdict, str]] = []
    for text in code:
        word, _, name = text.partition(" ")
        kind: Kind = "ptx" if word == "ptx" else "lto" if word == "lto" else "cubin"
        target = Target.parse(name)
        if not runs_on(target, kind, capability):
            continue
        verdict: Verdict = "ptx"
        if kind == "cubin":
            verdict = "family" if target.suffix == "f" else "native"
        shown = name if kind == "cubin" else f"{name} {kind.upper()}"
        ways.append((VERDICTS.index(verdict), target, verdict, shown))
    if not ways:
        return "missing", ""
    rank = min(way[0] for way in ways)
    _, _, verdict, shown = max(
        (way for way in ways if way[0] == rank), key=lambda way: way[1].capability
    )
    return verdict, shown
