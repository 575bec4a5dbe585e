"""Coverage of each kernel family by an image: native code, sources with a compiler, or nothing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from vllm_forge.kernels.coverage.device_code import device_code
from vllm_forge.kernels.coverage.families import (
    FINE,
    VERDICTS,
    Catalogue,
    CoverageVerdict,
    Cubins,
    Kernels,
    Libraries,
    Sources,
    catalogue,
    worst,
)
from vllm_forge.kernels.coverage.library import (
    LibraryCode,
    code_sizes,
    compiled_for,
    library_code,
    mapped,
)
from vllm_forge.kernels.coverage.target import Capability, Kind, Target, runs_on


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """A family, or a part of one, on a GPU.

    ``codes``: what it runs as, e.g. ``100f``, ``80 PTX``, ``nvcc``; empty if it is missing.
    """

    verdict: CoverageVerdict
    codes: tuple[str, ...]
    detail: str


def _missing(detail: str) -> Coverage:
    return Coverage(verdict="missing", codes=(), detail=detail)


@dataclass(frozen=True)
class SitePackages:
    """The site-packages folders of an image, lowest layer first."""

    sites: tuple[Path, ...]
    rows: Catalogue = field(default_factory=catalogue)
    _libraries: dict[Path, LibraryCode] = field(default_factory=dict)
    _files: dict[str, list[tuple[str, Path]]] = field(default_factory=dict)
    _targets: dict[tuple[str, str], bool] = field(default_factory=dict)
    _cubin_targets: dict[str, list[Target]] = field(default_factory=dict)

    def find(self, glob: str) -> list[tuple[str, Path]]:
        """Path below site-packages and real path of each file; an upper layer hides a lower one."""
        if glob not in self._files:
            merged = {
                path.relative_to(site).as_posix(): path
                for site in self.sites
                for path in site.glob(glob)
                if path.is_file()
            }
            self._files[glob] = sorted(merged.items())
        return self._files[glob]

    def library(self, name: str, path: Path) -> LibraryCode:
        if path not in self._libraries:
            self._libraries[path] = library_code(path, self.rows.patterns_of(name))
        return self._libraries[path]

    def libraries(self) -> dict[str, dict[str, Any]]:
        """Every library with device code: its size, and bytes per target, by path."""
        rows = {}
        for name, path in self.find("**/*.so*"):
            if path.is_symlink():
                continue
            if self.rows.patterns_of(name):
                code = self.library(name, path).code
            else:
                with mapped(path) as buffer:
                    code = code_sizes(device_code(buffer, str(path)))
            if code:
                rows[name] = {"size": path.stat().st_size, "code": dict(code)}
        return rows

    def coverage(self, name: str, capability: Capability, line: str) -> Coverage | None:
        """A family on a GPU; None if none of its parts concern that GPU."""
        parts = [
            self._part(part, capability)
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

    def _part(
        self, part: Kernels | Libraries | Sources | Cubins, capability: Capability
    ) -> Coverage:
        match part:
            case Kernels():
                return self._kernels(part, capability)
            case Libraries():
                return self._library_files(part, capability)
            case Sources():
                return self._sources(part, capability)
        return self._cubins(part, capability)

    def _kernels(self, part: Kernels, capability: Capability) -> Coverage:
        """Each kernel of the pattern must have a body; the worst one counts."""
        groups = [
            (name, group, *best(group.code, capability))
            for glob in part.libraries
            for name, path in self.find(glob)
            for group in self.library(name, path).patterns.get(part.match, ())
        ]
        if not groups:
            return _missing(f"no such kernel in {', '.join(part.libraries)}")
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

    def _library_files(self, part: Libraries, capability: Capability) -> Coverage:
        results: list[tuple[CoverageVerdict, str]] = []
        missing: list[str] = []
        for glob in part.paths:
            files = self.find(glob)
            if not files:
                results.append(("missing", ""))
                missing.append(f"no {glob}")
            for name, path in files:
                results.append(best(tuple(self.library(name, path).code), capability))
                if results[-1][0] == "missing":
                    missing.append(f"{name} has no code for it")
        codes = tuple(dict.fromkeys(code for _, code in results if code))
        detail = "; ".join(missing) or f"the libraries have {', '.join(codes)}"
        return Coverage(verdict=worst(row[0] for row in results), codes=codes, detail=detail)

    def _sources(self, part: Sources, capability: Capability) -> Coverage:
        compiler = self.rows.compiler[part.compiler]
        missing = [glob for glob in (*part.files, *compiler.files) if not self.find(glob)]
        if missing:
            return _missing(f"not there: {', '.join(missing)}")
        target = f"sm_{Target(*capability, 'a')}"
        key = (compiler.targets, target)
        if key not in self._targets:
            word = re.compile(re.escape(target.encode()) + rb"(?![0-9A-Za-z])")
            self._targets[key] = any(_search(path, word) for _, path in self.find(key[0]))
        if not self._targets[key]:
            return _missing(f"{part.compiler} of this image does not know {target}")
        detail = f"compiled by {part.compiler} on first use"
        return Coverage(verdict="source", codes=(part.compiler,), detail=detail)

    def _cubins(self, part: Cubins, capability: Capability) -> Coverage:
        files = self.find(part.files)
        if part.files not in self._cubin_targets:
            targets = {target for _, path in files if (target := _cubin_target(path))}
            self._cubin_targets[part.files] = sorted(targets)
        names = [str(target) for target in self._cubin_targets[part.files]]
        verdict, code = best([f"cubin {name}" for name in names], capability)
        if verdict != "missing":
            detail = f"{len(files)} cubins, run as {code}"
            return Coverage(verdict=verdict, codes=(code,), detail=detail)
        if not files and self.find(part.fetcher):
            detail = f"no cubins in the image: {part.fetcher} downloads them at the first start"
            return Coverage(verdict="download", codes=("network",), detail=detail)
        return _missing(f"{len(files)} cubins for {', '.join(names) or 'nothing'}")


def _search(path: Path, word: re.Pattern[bytes]) -> bool:
    with mapped(path) as buffer:
        return word.search(buffer) is not None


def _cubin_target(path: Path) -> Target | None:
    with mapped(path) as buffer:
        return compiled_for(buffer)


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
