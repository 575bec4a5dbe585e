"""The GPU suite as data: its tiers, their cases, and the hash that a receipt is bound to.

A tier's hash covers its tests, the code and data that these import or name, its rows of suite.toml,
its cases, and the rows of matrix.toml that it reads. So a bound that was loosened afterwards is
another suite, and a new test of another tier is not.
"""

import ast
import hashlib
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from vllm_forge.host import hash_of, read_data
from vllm_forge.matrix import FrozenModel, Matrix, serve_arguments
from vllm_forge.project import Project
from vllm_forge.receipts.errors import SuiteDescriptionError
from vllm_forge.receipts.receipt import Detail

TESTS = "tests/gpu"
FILE = f"{TESTS}/suite.toml"
CASES = "records/gpu-cases.json"
RUNNER = f"{TESTS}/harness/run.py"
# What tests may import besides tests.gpu. Of the packages above it, nothing is used.
CODECS = "vllm_forge.checkpoints.codecs"
CODECS_FOLDER = f"src/{CODECS.replace('.', '/')}"
OURS = ("tests", "vllm_forge")
DOTTED = re.compile(r"tests\.gpu(\.\w+)+")
FILE_NAME = re.compile(r"\w[\w.-]*")
LIST_CASES = "run: python -m tests.support.list_gpu_cases"


class Tier(FrozenModel):
    """A part of the suite that is run and receipted as one."""

    folders: tuple[str, ...]  # of its tests, relative to the repository
    minutes: int  # that it may take
    matrix: tuple[Literal["sku", "preset"], ...] = ()  # what its tests read, see MATRIX_ROWS
    gpus: int = 1
    on_request: bool = False  # it runs only where it is named


class MoreTiers(FrozenModel):
    """``suite.toml`` in a folder of the suite."""

    tier: dict[str, Tier]


class Suite(MoreTiers):
    """``tests/gpu/suite.toml``; ``release_sources`` are paths in vLLM's source."""

    release_sources: tuple[str, ...]


class Case(FrozenModel):
    """One test with its parameters."""

    archs: tuple[str, ...]  # markers of the GPUs that it is for; none: all
    engines: tuple[str, ...]  # that it reads; each leaves a boot log
    margins: bool  # it records measured values with their bounds


class CaseList(FrozenModel):
    """The cases of a tier by node id, as pytest collected them of ``sources_sha256``."""

    sources_sha256: str
    cases: dict[str, Case]


CASE_LISTS = TypeAdapter(dict[str, CaseList])


def _presets(matrix: Matrix, sku: str) -> list[dict[str, Any]]:
    """How the SKU serves: tests of full artifacts start servers like that."""
    rows = []
    for name, preset in matrix.preset.items():
        if preset.sku == sku:
            arguments, env = serve_arguments(matrix, name)
            row = preset.model_dump(
                mode="json", include={"artifacts", "tensor_parallel", "speculative_tokens"}
            )
            env = {**matrix.sku[sku].env, **env}
            rows.append({"name": name, "arguments": arguments, "env": env} | row)
    return rows


MATRIX_ROWS: dict[str, Callable[[Matrix, str], Any]] = {
    "sku": lambda matrix, _: {name: row.compute_capability for name, row in matrix.sku.items()},
    "preset": _presets,
}


def read_suite(root: Path) -> Suite:
    """``tests/gpu/suite.toml``, with further tiers of the suite.toml in a folder beside it.

    SuiteDescriptionError: one is missing or malformed, or a tier has two rows.
    """
    rows = ", ".join(MATRIX_ROWS)
    remedy = f"name folders, minutes, and what of matrix.toml the tests read: {rows}"
    suite = read_data(
        root / FILE, Suite.model_validate, SuiteDescriptionError, what="suite", remedy=remedy
    )
    for path in sorted((root / TESTS).glob(f"*/{Path(FILE).name}")):
        more = read_data(
            path, MoreTiers.model_validate, SuiteDescriptionError, what="tiers", remedy=remedy
        ).tier
        if both := sorted(more.keys() & suite.tier.keys()):
            raise SuiteDescriptionError(f"duplicate tier {both[0]}", where=path, remedy=remedy)
        suite = suite.model_copy(update={"tier": suite.tier | more})
    return suite


def source_files(root: Path, tier: Tier) -> list[str]:
    """Files that a tier's verdicts depend on, sorted, relative to the repository.

    Those of its folders, the runner, and all that they import or name: modules in strings
    (plugins, ``python -m``), and files and folders of data beside a module.

    SuiteDescriptionError: a folder is missing, a file is not Python, or it imports what a GPU host
    does not get.
    """
    queue = [root / RUNNER]
    for folder in tier.folders:
        if not (root / folder).is_dir():
            raise SuiteDescriptionError(f"{folder} is not a directory", where=root / FILE)
        queue += _files(root / folder)
    known: set[Path] = set()
    while queue:
        path = queue.pop()
        if path not in known:
            known.add(path)
            queue += _named(root, path) if path.suffix == ".py" else ()
    return sorted(path.relative_to(root).as_posix() for path in known)


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def _named(root: Path, path: Path) -> Iterator[Path]:
    """What one module imports or names; pytest imports the conftest.py above a test."""
    try:
        names, files = _mentioned(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise SuiteDescriptionError(f"cannot read a test: {error}", where=path) from None
    for name in sorted(names):
        yield from _module(root, path, name)
    for beside in path.parent.iterdir():
        if beside.name in files:
            yield from _data(beside)
    above = ("__init__.py", "conftest.py") if path.name.startswith("test_") else ("__init__.py",)
    for top in (root / TESTS, root / CODECS_FOLDER):
        if path.is_relative_to(top):
            for parent in path.parents[: len(path.relative_to(top).parts)]:
                yield from filter(Path.is_file, map(parent.joinpath, above))


@cache  # tiers share files, and a receipt is compared with the files of its tier more than once
def _mentioned(source: str) -> tuple[set[str], set[str]]:
    """Project modules that a source imports or names, and strings that may name a file."""
    names, files = set[str](), set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"relative import of {node.module}")
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value} if DOTTED.fullmatch(node.value) else set()
            files |= {node.value} if FILE_NAME.fullmatch(node.value) else set()
    return {name for name in names if name.split(".", maxsplit=1)[0] in OURS}, files


def _data(path: Path) -> Iterator[Path]:
    """A file, or the files of a folder without Python: else it is named for another reason."""
    files = [path] if path.is_file() else _files(path) if path.is_dir() else []
    if path.is_file() or not any(file.suffix == ".py" for file in files):
        yield from files


def _module(root: Path, importer: Path, name: str) -> Iterator[Path]:
    if f"{name}.".startswith(("tests.gpu.", f"{CODECS}.")):
        base = root / ("src" if name.startswith("vllm_forge") else "") / name.replace(".", "/")
        yield from filter(Path.is_file, (base.with_suffix(".py"), base / "__init__.py"))
    else:
        what = f"tests/gpu must not import {name}"
        remedy = f"a GPU host has tests/gpu and {CODECS}: import nothing else of the project"
        raise SuiteDescriptionError(what, where=importer, remedy=remedy)


def _hash_files(root: Path, names: list[str]) -> dict[str, str]:
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names}


def _suite_rows(root: Path, name: str) -> dict[str, Any]:
    rows = read_suite(root).model_dump(mode="json")
    return {"tier": rows["tier"][name], "release_sources": rows["release_sources"]}


def sources_hash(root: Path, name: str) -> str:
    """SHA-256 in hex of a tier's files and rows of suite.toml, which its list of cases is of."""
    files = _hash_files(root, source_files(root, read_suite(root).tier[name]))
    return hash_of({"files": files, "rows": _suite_rows(root, name)}, sort_keys=True)


def plan_tier(project: Project, name: str, sku: str) -> dict[str, Any]:
    """What the runner needs of a tier; ``rows`` and the hashes of ``files`` are what is hashed."""
    root = project.root
    tier = read_suite(root).tier[name]
    cases = {case: row.model_dump() for case, row in read_cases(root, name).items()}
    return {
        "folders": list(tier.folders),
        "minutes": tier.minutes,
        "files": source_files(root, tier),
        "rows": {
            **_suite_rows(root, name),
            "cases": hash_of(cases, sort_keys=True),
            "matrix": {row: MATRIX_ROWS[row](project.matrix, sku) for row in tier.matrix},
        },
    }


def suite_hash(project: Project, name: str, sku: str) -> str:
    """SHA-256 in hex of what a tier's verdicts on a SKU depend on; the runner computes the same."""
    tier = plan_tier(project, name, sku)
    files = _hash_files(project.root, tier["files"])
    return hash_of({"files": files, "rows": tier["rows"]}, sort_keys=True)


def read_cases(root: Path, name: str) -> dict[str, Case]:
    """Node id -> case, of one tier, from ``records/gpu-cases.json``.

    Only pytest knows which cases a test with parameters has, and the verifier does without it.
    """
    path = root / CASES
    listed = read_data(
        path,
        lambda data: CASE_LISTS.validate_python(data)[name],
        SuiteDescriptionError,
        what=f"list of the cases of tier {name}",
        remedy=LIST_CASES,
    )
    if listed.sources_sha256 != sources_hash(root, name):
        what = f"tier {name} changed since its cases were listed"
        raise SuiteDescriptionError(what, where=path, remedy=LIST_CASES)
    return listed.cases


def case_faults(root: Path, detail: Detail) -> Iterator[str]:
    """How the tests of a receipt differ from the cases of its tier, each green on its GPU."""
    cases, tests = read_cases(root, detail.tier), detail.tests
    marker = f"sm_{detail.gpus[0].compute_capability.replace('.', '')}"
    due = {name for name, case in cases.items() if not case.archs or marker in case.archs}
    passed = {name for name, test in tests.items() if test.outcome == "passed"}
    measured = {name for name, test in tests.items() if test.margins}
    for what, names in {
        "lacks": due - passed | cases.keys() - tests.keys(),
        "has unknown cases:": passed - due | tests.keys() - cases.keys(),
        "lacks the margins of": {name for name in due if cases[name].margins} - measured,
        "lacks the boot log of": {engine for name in due for engine in cases[name].engines}
        - detail.configurations.keys(),
    }.items():
        if names:
            yield f"{what} {len(names)}: {', '.join(sorted(names)[:3])}"
