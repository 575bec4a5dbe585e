"""Where a line's vLLM can stop after it loaded the weights: every raise and assert, and its cover.

The rows of late_stops.toml say which functions are on that way, and what covers them; the source
says which statements they have.
"""

import ast
import textwrap
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path

from vllm_forge.host import read_data, write_json
from vllm_forge.kernels.errors import SelectionChangedError, SelectionFileError
from vllm_forge.matrix import FrozenModel
from vllm_forge.sources import SourceRepo

DATA = files("vllm_forge.kernels.selection") / "late_stops.toml"
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


class Stop(FrozenModel):
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


def require_cited(repo: SourceRepo, tree: str, source: str) -> None:
    """SelectionChangedError if ``PATH:LINE: TEXT`` is not in a source tree."""
    place, _, text = source.partition(": ")
    path, _, number = place.rpartition(":")
    content = repo.git("cat-file", "blob", f"{tree}:{path}", check=False).stdout.decode()
    if not any(text in line for line in content.splitlines()[int(number) - 1 : int(number)]):
        raise SelectionChangedError(
            f"{place} does not have the text {text!r}",
            where="matrix.toml, line.*.chat.source",
            remedy="look up what decides it in this release",
        )


def stops_path(records: Path, line_name: str) -> Path:
    return records / "late-stops" / f"{line_name}.json"


def write_stops(records: Path, line_name: str, stops: tuple[Stop, ...]) -> Path:
    path = stops_path(records, line_name)
    path.parent.mkdir(exist_ok=True)
    write_json(path, [list(stop.model_dump().values()) for stop in stops])
    return path


def read_stops(records: Path, line_name: str) -> tuple[Stop, ...]:
    """The recorded places; SelectionFileError if missing or malformed."""
    names = tuple(Stop.model_fields)
    return read_data(
        stops_path(records, line_name),
        lambda rows: tuple(Stop.model_validate(dict(zip(names, row, strict=True))) for row in rows),
        SelectionFileError,
        what=f"late stops of line {line_name}",
        remedy=f"run: nox -s forge -- kernels select --record --line {line_name}",
    )


def require_same_stops(records: Path, line_name: str, stops: tuple[Stop, ...]) -> None:
    """SelectionChangedError if the source, or what covers it, is not as recorded."""
    before, now = set(read_stops(records, line_name)), set(stops)
    if before != now:
        changed = [f"- {s.where}: {s.text} ({s.cover})" for s in sorted(before - now, key=str)]
        changed += [f"+ {s.where}: {s.text} ({s.cover})" for s in sorted(now - before, key=str)]
        raise SelectionChangedError(
            f"line {line_name}: places where vLLM stops after loading changed:\n  "
            + "\n  ".join(changed),
            where=str(stops_path(records, line_name)),
            remedy="correct kernels/selection/late_stops.toml, or record them again",
        )
