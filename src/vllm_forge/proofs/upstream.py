"""vLLM's own tests, as published and as patched: a test that only the release passes is a fault.

The tests come from the release's source, with its ``conftest.py``; tests/patches/upstream.toml
lists them. They run in the image's own files, without network or GPU; what needs a GPU is skipped
by both trees, and its record says so.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.table import Table

from vllm_forge.host import Runner, atomic_path, console, exclusive, read_data, report, write_json
from vllm_forge.matrix import FrozenModel
from vllm_forge.project import Project
from vllm_forge.proofs import prove
from vllm_forge.proofs.environment import PYTHON, open_line
from vllm_forge.proofs.errors import ProofNotRunError, RegressionError, UpstreamRowsError

ROWS = "tests/patches/upstream.toml"
REQUIREMENTS = "tests/patches/requirements-upstream.txt"
CONTENT = ("tests", "pyproject.toml")  # of the release's source
LIMIT = 1200  # seconds for one tree; a test that waits for a network must not stop the run
PUBLISHED, PATCHED = "published", "patched"


class UpstreamTest(FrozenModel):
    """A row: a file of the release's tests, what it is about, the lines whose release has it."""

    path: str
    about: str
    lines: tuple[str, ...]


class _Rows(FrozenModel):
    test: tuple[UpstreamTest, ...]


def read_tests(root: Path, line: str) -> list[str]:
    """Paths of a line's rows; UpstreamRowsError if a row is invalid, or none is for the line."""
    rows = read_data(
        root / ROWS, _Rows.model_validate, UpstreamRowsError, what="rows", remedy="correct that row"
    )
    paths = [row.path for row in rows.test if line in row.lines]
    if not paths:
        raise UpstreamRowsError(
            f"no row is for line {line}", where=ROWS, remedy="name tests of its release"
        )
    return paths


def compare(project: Project, line: str, runner: Runner) -> Path:
    """Run a line's rows on both trees; returns the record that was written, or see ``judge``."""
    paths = read_tests(project.root, line)
    with exclusive(f"upstream-{line}", wait=False):
        with report(f"trees and environment of line {line}"):
            environment = open_line(project, line, runner, "upstream")
            inputs = environment.work / "inputs"  # for both runs
            with atomic_path(inputs) as aside:
                aside.mkdir()
                environment.repo.unpack(environment.applied.base, CONTENT, aside)
                prove.write_tools(aside, project.root / REQUIREMENTS)
        trees = {PUBLISHED: environment.applied.base, PATCHED: environment.applied.result}

        def run(name: str) -> prove.TestRun:
            script = f"/mnt/{prove.SCRIPT.name}"
            argv = ("/usr/bin/timeout", str(LIMIT), PYTHON, script, line, "1", *paths)
            return prove.parse(environment.run(name, trees[name], inputs, argv), name)

        with ThreadPoolExecutor(len(trees)) as pool:
            published, patched = pool.map(run, trees)
    rows = judge(line, paths, published, patched)
    table = Table(title=f"line {line}: vLLM's own tests, as published and as patched")
    for column in ("file", "outcomes"):
        table.add_column(column, overflow="fold")
    for file, counts in rows.items():
        table.add_row(file, ", ".join(f"{count} {name}" for name, count in counts.items()))
    console.print(table)
    path = project.records / "upstream" / f"{line}.json"
    vllm = environment.plan.cell.line.vllm
    write_json(path, {"line": line, "vllm": vllm, "trees": trees, "files": rows})
    return path


def judge(
    line: str, paths: list[str], published: prove.TestRun, patched: prove.TestRun
) -> dict[str, dict[str, int]]:
    """How many tests of each file have which pair of outcomes, as published and as patched.

    RegressionError if one passes only as published; ProofNotRunError if none passes, or ran.
    """
    for name, run in ((PUBLISHED, published), (PATCHED, patched)):
        if run.exit not in {prove.GREEN, prove.RED}:
            raise prove.not_run(f"line {line}, {name}", run)
    rows: dict[str, dict[str, int]] = {}
    for path in paths:
        names = sorted(
            name for name in {**published.tests, **patched.tests} if name.startswith(f"{path}::")
        )
        pairs = [tuple(run.tests.get(name, "missing") for run in (published, patched))
                 for name in names]  # fmt: skip
        if not any(before == "passed" for before, _ in pairs):
            what = f"line {line}: nothing in it passes as published: {dict(Counter(pairs))}"
            remedy = "take the line out of its row"
            raise ProofNotRunError(what, where=f"{ROWS}: {path}", remedy=remedy)
        if lost := [name for name, (before, after) in zip(names, pairs, strict=True)
                    if before == "passed" != after]:  # fmt: skip
            what = f"line {line}: {len(lost)} of vLLM's tests pass as published, not as patched"
            remedy = f"correct the patch; its message: {patched.why}"
            raise RegressionError(what, where="\n          ".join(lost[:10]), remedy=remedy)
        counts = Counter(before if before == after else f"{before}, then {after}"
                         for before, after in pairs)  # fmt: skip
        rows[path] = dict(sorted(counts.items()))
    return rows
