"""vLLM's own tests, as published and as patched: a test that only the release passes is a fault.

The tests come from the release's source, with its ``conftest.py``; tests/patches/upstream.toml
lists them. They run in the image's own files, without network or GPU; what needs a GPU is skipped
by both trees, and its record says so.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from pydantic import TypeAdapter

from vllm_forge.host import Runner, atomic_path, console, exclusive, read_data, report, write_json
from vllm_forge.project import Project
from vllm_forge.proofs import prove
from vllm_forge.proofs.environment import PYTHON, open_line
from vllm_forge.proofs.errors import ProofNotRunError, RegressionError, UpstreamRowsError

ROWS = "tests/patches/upstream.toml"
UPSTREAM_REQUIREMENTS = "tests/patches/requirements-upstream.txt"
CONTENT = ("tests", "pyproject.toml")  # of the release's source
LIMIT = 1200  # seconds for one tree; a test that waits for a network must not stop the run
PUBLISHED, PATCHED = "published", "patched"


def read_tests(root: Path, line: str) -> list[str]:
    """Paths of a line's tests; UpstreamRowsError if the file is invalid, or has none for it."""
    return read_data(
        root / ROWS,
        lambda data: TypeAdapter(dict[str, list[str]]).validate_python(data)[line],
        UpstreamRowsError,
        what=f"list of vLLM's tests for line {line}",
        remedy="name files of its release's tests",
    )


def compare(project: Project, line: str, runner: Runner) -> Path:
    """Run a line's rows on both trees; returns the record that was written, or see ``judge``."""
    paths = read_tests(project.root, line)
    with ExitStack() as stack:
        stack.enter_context(exclusive(f"upstream-{line}", wait=False))
        with report(f"trees and environment of line {line}"):
            environment = stack.enter_context(open_line(project, line, runner, "upstream"))
            inputs = environment.work / "inputs"  # for both runs
            with atomic_path(inputs) as aside:
                aside.mkdir()
                environment.repo.unpack(environment.applied.base, CONTENT, aside)
                prove.write_tools(aside, project.root, UPSTREAM_REQUIREMENTS)
        trees = {PUBLISHED: environment.applied.base, PATCHED: environment.applied.result}

        def run(name: str) -> prove.TestRun:
            script = f"/mnt/{prove.SCRIPT.name}"
            argv = ("/usr/bin/timeout", str(LIMIT), PYTHON, script, "/mnt", line, "1", *paths)
            return prove.parse(environment.run(name, trees[name], inputs, argv), name)

        with ThreadPoolExecutor(len(trees)) as pool:
            published, patched = pool.map(run, trees)
    rows = judge(line, paths, published, patched)
    for file, counts in rows.items():
        said = ", ".join(f"{count} {name}" for name, count in counts.items())
        console.print(f"  {file}: {said}", markup=False)
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
    before, after = published.tests, patched.tests
    if lost := [name for name in before if before[name] == "passed" != after.get(name)]:
        what = f"line {line}: {len(lost)} of vLLM's tests pass as published, not as patched"
        remedy = f"correct the patch; its message: {patched.why}"
        raise RegressionError(what, where="\n          ".join(lost[:10]), remedy=remedy)
    rows: dict[str, Counter[str]] = {path: Counter() for path in paths}
    for name in before | after:
        old, new = (outcomes.get(name, "missing") for outcomes in (before, after))
        counts = rows.setdefault(name.partition("::")[0], Counter())
        counts[old if old == new else f"{old}, then {new}"] += 1
    if idle := [path for path, counts in rows.items() if not counts["passed"]]:
        what = f"line {line}: nothing in it passes as published: {dict(rows[idle[0]])}"
        remedy = "take it out of the line's list"
        raise ProofNotRunError(what, where=f"{ROWS}: {idle[0]}", remedy=remedy)
    return {path: dict(sorted(counts.items())) for path, counts in rows.items()}
