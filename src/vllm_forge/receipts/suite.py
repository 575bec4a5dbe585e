"""The GPU suite as data: its tiers, what each consists of, and what must have run.

A receipt is for one tier of one suite. Its hash covers the tests of the tier's folders and the
code that judges them, so that a bound that was loosened afterwards is another suite.
"""

from __future__ import annotations

import ast
import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm_forge.receipts.errors import GpuSuiteError

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = "tests/gpu"
FILE = f"{TESTS}/suite.toml"
RACE_FOLDER = "dist/gpu/race"  # see tests/gpu/race/kit.py
SM = "sm_"
Marks: TypeAlias = list[ast.expr]


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A part of the suite that is run and receipted as one.

    Attributes:
        name: kernel, server or soak.
        folders: of its tests, relative to the repository.
        judges: files and folders whose code decides what is green.
        minutes: how long it may take.
    """

    name: str
    folders: tuple[str, ...]
    judges: tuple[str, ...]
    minutes: int


@dataclass(frozen=True, kw_only=True)
class RequiredTest:
    """A test function, the GPUs that it is for (none: all) and its tier (None: its folder's)."""

    name: str
    archs: frozenset[str]
    tier: str | None = None

    def runs_on(self, capability: str) -> bool:
        """Whether it is for a GPU of this compute capability."""
        return not self.archs or marker_of(capability) in self.archs


def marker_of(capability: str) -> str:
    """The marker of a compute capability: ``10.3`` is ``sm_103``."""
    return SM + capability.replace(".", "")


def _read(root: Path) -> dict[str, Any]:
    path = root / FILE
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GpuSuiteError(f"not the description of a suite: {error}", where=str(path)) from None


def read_tiers(root: Path) -> dict[str, Tier]:
    """The tiers of ``tests/gpu/suite.toml``.

    Raises:
        GpuSuiteError: the file is missing or malformed.
    """
    try:
        return {
            name: Tier(
                name=name,
                folders=tuple(row["folders"]),
                judges=tuple(row["judges"]),
                minutes=int(row["minutes"]),
            )
            for name, row in _read(root)["tier"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GpuSuiteError(
            f"a tier lacks folders, judges or minutes: {type(error).__name__}: {error}",
            where=str(root / FILE),
        ) from None


def suite_hash(root: Path, tier: Tier) -> str:
    """SHA-256 in hex over names and contents of all that a tier's verdicts depend on."""
    rows = [
        (path.relative_to(root).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in _files(root, (*tier.folders, *tier.judges))
    ]
    return hashlib.sha256(json.dumps(sorted(set(rows))).encode()).hexdigest()


def required_tests(root: Path, tier: Tier) -> tuple[RequiredTest, ...]:
    """Every test function of a tier, read from the source without importing it.

    Names are pytest's node ids without parameters, relative to the repository.
    """
    found = []
    for path in _files(root, tier.folders):
        if not path.name.startswith("test_") or path.suffix != ".py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        file = path.relative_to(root).as_posix()
        for names, marks in _tests(tree.body, _module_marks(tree)):
            archs, own = _read_marks(marks)
            if own in {None, tier.name}:
                found.append(RequiredTest(name="::".join((file, *names)), archs=archs, tier=own))
    return tuple(found)


def _tests(body: list[ast.stmt], outer: list[ast.expr]) -> Iterator[tuple[list[str], Marks]]:
    """Names and marks of the test functions of a module or class, as pytest finds them."""
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            for names, marks in _tests(node.body, [*outer, *node.decorator_list]):
                yield [node.name, *names], marks
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            yield [node.name], [*outer, *node.decorator_list]


def _module_marks(tree: ast.Module) -> list[ast.expr]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets
        ):
            value = node.value
            return value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]
    return []


def _read_marks(nodes: list[ast.expr]) -> tuple[frozenset[str], str | None]:
    """``pytest.mark.sm_90`` and ``pytest.mark.tier("soak")`` among expressions; the last tier."""
    archs, tier = set(), None
    for node in nodes:
        inner = node.func if isinstance(node, ast.Call) else node
        if not isinstance(inner, ast.Attribute):
            continue
        if inner.attr.startswith(SM):
            archs.add(inner.attr)
        elif inner.attr == "tier" and isinstance(node, ast.Call):
            tier = ast.literal_eval(node.args[0])
    return frozenset(archs), tier


def _files(root: Path, names: tuple[str, ...]) -> Iterator[Path]:
    for name in names:
        path = root / name
        if path.is_dir():
            for inner in sorted(path.rglob("*")):
                if inner.is_file() and "__pycache__" not in inner.parts:
                    yield inner
        elif path.is_file():
            yield path
        else:
            raise GpuSuiteError(
                f"the suite names {name}, which does not exist", where=str(root / FILE)
            )
