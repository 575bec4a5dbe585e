"""Where a line's vLLM can stop after it loaded the weights: every raise and assert, and its cover.

    python -m tests.support.late_stops      # writes records/late-stops; then: nox -s docs

The rows of late_stops.toml say which functions are on that way, and what covers them; the source
says which statements they have. It comes from the cache: `nox -s patches` fetches it.
"""

from __future__ import annotations

import ast
import textwrap
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vllm_forge.host import write_json
from vllm_forge.matrix import FrozenModel
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.sources import SourceRepo

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = Path(__file__).with_suffix(".toml")
RECORDS = "records/late-stops"
MOST_CHARS = 160


class Scope(FrozenModel):
    """Functions of a file, by fnmatch patterns, and the name of what covers them."""

    file: str
    functions: tuple[str, ...] = ("*",)
    cover: str


class Scopes(FrozenModel):
    """late_stops.toml."""

    cover: dict[str, str]
    scope: tuple[Scope, ...]


class Stop(NamedTuple):
    where: str  # PATH:LINE
    function: str
    text: str  # the statement, cut
    cover: str


def read_scopes() -> Scopes:
    return Scopes.model_validate(tomllib.loads(DATA.read_text(encoding="utf-8")))


def find_stops(repo: SourceRepo, tree: str) -> tuple[Stop, ...]:
    """All statements of the scopes in a source tree, in the order of paths and lines."""
    scopes = read_scopes().scope
    stops: list[Stop] = []
    for path in repo.text("ls-tree", "-r", "--name-only", tree, "vllm/").splitlines():
        rows = [scope for scope in scopes if fnmatchcase(path, scope.file)]
        if rows:
            source = repo.git("cat-file", "blob", f"{tree}:{path}").stdout
            stops += _of_file(path, ast.parse(source), rows)
    return tuple(stops)


def _of_file(path: str, module: ast.Module, scopes: list[Scope]) -> Iterator[Stop]:
    for function, node in _statements(module, ""):
        cover = next(
            (s.cover for s in scopes if any(fnmatchcase(function, p) for p in s.functions)), None
        )
        if cover is not None:
            text = textwrap.shorten(ast.unparse(node), MOST_CHARS, placeholder=" ...")
            where = f"{path}:{node.lineno}"
            yield Stop(where=where, function=function, text=text, cover=cover)


def _statements(node: ast.AST, name: str) -> Iterator[tuple[str, ast.Raise | ast.Assert]]:
    """Qualified name of the function, and each raise and assert that is not about None alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue  # has no statements, and is most of a tree
        inner = name
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{name}.{child.name}".lstrip(".")
        if isinstance(child, ast.Raise) or (isinstance(child, ast.Assert) and not _narrows(child)):
            yield name, child
        yield from _statements(child, inner)


def _narrows(node: ast.Assert) -> bool:
    """``assert x is not None``."""
    test = node.test
    return isinstance(test, ast.Compare) and [type(op) for op in test.ops] == [ast.IsNot]


def main() -> None:
    """Record the stops of all lines, and what each cover is."""
    project = Project.find()
    for name, line in project.matrix.line.items():
        tree = read_tree_lock(project.root / line.series, name).result
        record = {"covers": read_scopes().cover, "stops": find_stops(SourceRepo(), tree)}
        write_json(project.root / RECORDS / f"{name}.json", record)


if __name__ == "__main__":
    main()
