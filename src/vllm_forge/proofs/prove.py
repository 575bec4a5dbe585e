"""Every patch red without, green with: the contract tests in the environment that ships.

A run has the tests, pytest and cmake, the reference models, and the files of the release that no
wheel has: the sources of its native code. Red is pytest's exit code 1, and nothing else. Equal
inputs give equal records. Without its patch a proof runs alone, so it runs alone with it, too: a
test that needs what an earlier one left behind is red either way.

vLLM's own tests run as published and as patched: one that passes only as published is a fault. They
come from the release's source, with its ``conftest.py``; ``UPSTREAM_ROWS`` lists them. They run in
the image's own files, without network or GPU; what needs a GPU is skipped by both trees, and its
record says so.
"""

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich.markup import escape
from rich.table import Table

from vllm_forge.errors import ForgeError
from vllm_forge.host import Runner, atomic_path, console, exclusive, read_data, report, write_json
from vllm_forge.patches import Decision, Patch, decisions, read_dispositions, read_series
from vllm_forge.patches.series import Variant, pairs, require_idempotent, without
from vllm_forge.project import Project
from vllm_forge.proofs import errors
from vllm_forge.proofs.environment import PYTHON, open_line
from vllm_forge.proofs.record import CHECKOUT, ProofJob, TestRun, write_record
from vllm_forge.sources import SourceRepo, Wheelhouse, read_wheels

MOST_WORKERS = 8  # each takes about 2 GB
ALL_TESTS = "tests/patches"
WHOLE = "whole"
# Reported first if there are several problems.
FIRST = (errors.UselessPatchError, errors.ProofNotRunError)
SCRIPT = Path("tests/gpu/upstream/run_tests.py")
REQUIREMENTS = "tests/patches/requirements.txt"
# Sources of the release's native code, and the GPUs that it is built for.
NATIVE = ("CMakeLists.txt", "cmake", "csrc", ".buildkite/release-pipeline.yaml")
GREEN, RED = 0, 1  # pytest.ExitCode.OK and TESTS_FAILED
CLEAR = {"passed", "failed"}
WHY_CHARS = 160
UPSTREAM_ROWS = "tests/patches/upstream.toml"
UPSTREAM_REQUIREMENTS = "tests/patches/requirements-upstream.txt"
UPSTREAM_SOURCE = ("tests", "pyproject.toml")  # of the release
UPSTREAM_S = 1200  # for one tree; a test that waits for a network must not stop the run
PUBLISHED, PATCHED = "published", "patched"
# Code that does not load makes any test red, which proves nothing about a patch.
# So does a host without memory, disk or time, and a test of a function that only the patch adds.
UNRELATED = re.compile(
    r"^(?:(?:SyntaxError|IndentationError|ImportError|ModuleNotFoundError|MemoryError|OSError"
    r"|TimeoutError|subprocess\.TimeoutExpired)\b|AttributeError: <?module 'vllm\b"
    r"|RuntimeError: .*(?:allocate memory|No space left|can't start new thread))"
)
CHANGING = re.compile(r"\b0x[0-9a-f]+\b|/(?:tmp|opt|mnt|srv)/\S+")


def parse(output: str, where: str) -> TestRun:
    """Read the JSON on the last line of run_tests.py's output, else ProofNotRunError."""
    try:
        run = TestRun.model_validate_json(output.strip().splitlines()[-1])
    except (IndexError, ValidationError):
        what = "the tests printed no verdict"
        raise errors.ProofNotRunError(what, where=where, remedy=output[-2000:]) from None
    return run.model_copy(update={"why": CHANGING.sub("...", run.why)[:WHY_CHARS]})


def judge_whole(line: str, patches: Sequence[Patch], run: TestRun) -> Iterator[ForgeError]:
    """All contract tests on the whole series: none is red, and every proof ran."""
    if run.exit == RED:
        red = [name for name, outcome in run.tests.items() if outcome == "failed"]
        what = f"line {line}: {len(red)} contract tests are red with the whole series: {run.why}"
        remedy = "correct the patch, or dispositions.toml where it contradicts the series"
        yield errors.ProofRedError(what, where="\n          ".join(red[:10]), remedy=remedy)
    elif run.exit != GREEN:
        yield not_run(f"line {line}, whole series", run)
        return
    for patch in patches:
        outcomes = run.outcomes(patch.proves)
        if not outcomes["passed"] and not outcomes["failed"]:
            yield _no_proof(line, patch, "is missing, or passes nowhere on this line")
        elif other := {name: count for name, count in outcomes.items() if name not in CLEAR}:
            yield _no_proof(line, patch, f"ran only in part: {other}")


def judge_grounds(
    line: str, decided: Sequence[tuple[str, Decision]], run: TestRun
) -> Iterator[ForgeError]:
    """Every contract test that a decision relies on ran. ``judge_whole`` reports red ones."""
    for about, decision in decided:
        if decision.proof is None:
            continue
        outcomes = run.outcomes(decision.proof)
        if not outcomes or not outcomes.keys() <= CLEAR:
            yield errors.ProofNotRunError(
                f"line {line}: {about} is {decision.status} for what a test shows, but that "
                f"test was not run: {dict(outcomes) or 'not found'}",
                where=f"dispositions.toml: {about}: {decision.proof}",
                remedy="name a test that runs on this line",
            )


def judge_without(line: str, variant: Variant, run: TestRun) -> ForgeError | None:
    """The proof on the tree without its patch; None if it is red, as required."""
    patch = variant.left_out
    outcomes = run.outcomes(patch.proves)
    if not outcomes.keys() <= CLEAR:
        return _no_proof(line, patch, f"ran only in part: {dict(outcomes)}")
    if run.exit == GREEN and outcomes["passed"]:
        return errors.UselessPatchError(
            f"line {line}: {patch.name} proves nothing: drop it. Its proof is green without it",
            where=f"{patch.path}: Proves: {patch.proves}",
            remedy="delete the file and its line in the series; if the change is needed, write "
            "the test that shows it",
        )
    if run.exit != RED or not outcomes["failed"]:
        return not_run(f"line {line}, without {patch.name}", run)
    if UNRELATED.match(run.why):
        why = "code does not load, or the host lacks memory, disk or time"
        return _no_proof(line, patch, f"is red only because {why}: {run.why}")
    return None


def judge_alone(line: str, patch: Patch, run: TestRun) -> ForgeError | None:
    """The proof on the whole series, alone as without its patch; None if it is green."""
    outcomes = run.outcomes(patch.proves)
    if run.exit == RED:
        what = f"line {line}: run alone, the proof of {patch.name} is red with the whole series"
        where = f"{patch.path}: Proves: {patch.proves}: {run.why}"
        remedy = "let it need nothing that other tests leave behind"
        return errors.ProofRedError(what, where=where, remedy=remedy)
    if run.exit != GREEN:
        return not_run(f"line {line}, with {patch.name}", run)
    if outcomes.keys() != {"passed"}:
        return _no_proof(line, patch, f"ran only in part when run alone: {dict(outcomes)}")
    return None


def _no_proof(line: str, patch: Patch, fault: str) -> errors.ProofNotRunError:
    what = f"line {line}: the proof of {patch.name} {fault}"
    where = f"{patch.path}: Proves: {patch.proves}"
    remedy = "name a test that passes with the patch and fails without it, on this line"
    return errors.ProofNotRunError(what, where=where, remedy=remedy)


def not_run(name: str, run: TestRun) -> errors.ProofNotRunError:
    what = f"{name}: pytest exited with {run.exit}, which is neither green (0) nor red (1)"
    return errors.ProofNotRunError(what, where=run.why, remedy=run.tail)


def show(job: ProofJob, whole: TestRun, runs: Sequence[TestRun]) -> None:
    table = Table(title=f"line {job.line_name}, vLLM {job.environment.plan.cell.line.vllm}")
    for column in ("patch", "without it", "with the series", "why it is red"):
        table.add_column(column, overflow="fold")
    for variant, run in zip(job.variants, runs, strict=True):
        patch = variant.left_out
        counts = (_counts(each.outcomes(patch.proves)) for each in (run, whole))
        table.add_row(patch.name, *counts, escape(run.why))
    counts_of_all = _counts(Counter(whole.tests.values()))
    table.add_row("all contract tests", "", counts_of_all, "", style="bold")
    console.print(table)


def _counts(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))


def prove(project: Project, names: Sequence[str], runner: Runner) -> None:
    """Prove lines, write ``records/proofs/<line>.json`` of the proven, raise the first problem."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(exclusive(f"prove-{name}", wait=False))
        jobs = [_prepare(project, name, runner, stack) for name in names]
        proofs = _run_all(jobs)
    problems: list[ForgeError] = []
    for job, (whole, proof_runs) in zip(jobs, proofs, strict=True):
        name = job.line_name
        runs = [without_it for without_it, _ in proof_runs]
        show(job, whole, runs)
        red = [*judge_whole(name, [variant.left_out for variant in job.variants], whole)]
        if whole.exit == GREEN:
            red += judge_grounds(name, job.decided, whole)
        for variant, (without_it, with_it) in zip(job.variants, proof_runs, strict=True):
            red += filter(None, [judge_without(name, variant, without_it)])
            if whole.exit == GREEN:
                red += filter(None, [judge_alone(name, variant.left_out, with_it)])
        if not red:
            path = write_record(project.records, job, whole, runs).relative_to(project.root)
            print(f"line {name}: proven, {path}")
        problems += red
    if problems:
        problems.sort(key=lambda problem: not isinstance(problem, FIRST))
        for problem in problems[1:]:
            console.print(f"{type(problem).__name__}: {problem}", markup=False)
        raise problems[0]


def _prepare(project: Project, name: str, runner: Runner, stack: ExitStack) -> ProofJob:
    """Everything but the tests, which take the time."""
    series = project.root / project.matrix.line[name].series
    with report(f"trees and environment of line {name}"):
        patches = read_series(series)
        environment = stack.enter_context(open_line(project, name, runner, "proofs"))
        repo, applied = environment.repo, environment.applied
        require_idempotent(repo, applied, patches)
        return ProofJob(
            line_name=name,
            environment=environment,
            inputs=write_inputs(project.root, environment.work / "inputs", repo, applied.base),
            pairs=pairs(repo, applied, patches),
            variants=tuple(without(repo, applied, patches, i) for i in range(len(patches))),
            decided=decisions(read_dispositions(series.parent), name),
        )


def write_inputs(root: Path, folder: Path, repo: SourceRepo, base: str) -> Path:
    """Copy the inputs of the tests to ``folder``, so that an edit during a run changes nothing.

    ``base``: tree of the release; no series changes its native code, as wheels are not built.
    """
    with atomic_path(folder) as aside:
        aside.mkdir()
        skip = shutil.ignore_patterns("__pycache__")
        for path in ("patches", "pyproject.toml", *CHECKOUT):
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            if (root / path).is_dir():
                shutil.copytree(root / path, aside / path, ignore=skip)
            else:
                shutil.copyfile(root / path, aside / path)
        repo.unpack(base, NATIVE, aside / "source")
        write_tools(aside, root, REQUIREMENTS)
    return folder


def write_tools(folder: Path, root: Path, requirements: str) -> None:
    """Write run_tests.py, and the wheels that come after the image's own on sys.path."""
    shutil.copyfile(root / SCRIPT, folder / SCRIPT.name)
    _, wheels = read_wheels(root / requirements, "name wheels, sorted, with hashes")
    Wheelhouse().unpack(wheels, folder / "tools")


def _run_all(jobs: Sequence[ProofJob]) -> list[tuple[TestRun, list[tuple[TestRun, TestRun]]]]:
    """Run all trees of all lines in parallel, the long runs first.

    Of each line: all tests on the whole series, and each proof, without its patch and with it.
    """
    cores = len(os.sched_getaffinity(0))
    workers = min(cores, MOST_WORKERS)
    threads = str(max(1, cores // workers))
    with ThreadPoolExecutor(workers) as pool:

        def submit(
            job: ProofJob, name: str, tree: str | None = None, test: str = ALL_TESTS
        ) -> Future[TestRun]:
            return pool.submit(
                _run, job, name, tree or job.environment.applied.result, test, threads
            )

        wholes = [submit(job, WHOLE) for job in jobs]
        proofs = [
            [
                (
                    submit(job, f"without {patch.path.stem}", variant.tree, patch.proves),
                    submit(job, f"with {patch.path.stem}", test=patch.proves),
                )
                for variant in job.variants
                for patch in [variant.left_out]
            ]
            for job in jobs
        ]
        return [
            (whole.result(), [(one.result(), other.result()) for one, other in runs])
            for whole, runs in zip(wholes, proofs, strict=True)
        ]


def _run(job: ProofJob, name: str, tree: str, test: str, threads: str) -> TestRun:
    """Run a proof, or all tests, on a tree."""
    start = time.monotonic()
    # The order of a set must not decide between a proof with its patch and without it.
    seeded = ("/usr/bin/env", "PYTHONHASHSEED=0", PYTHON)
    argv = (*seeded, f"/mnt/{SCRIPT.name}", "/mnt", job.line_name, threads, test)
    output = job.environment.run(name.replace(" ", "-"), tree, job.inputs, argv)
    run = parse(output, f"line {job.line_name}, {name}")
    verdict = "green" if run.exit == GREEN else f"exit {run.exit}"
    seconds = time.monotonic() - start
    console.print(f"  line {job.line_name}, {name}: {verdict} ({seconds:.0f} s)")
    return run


def read_upstream(root: Path, line: str) -> list[str]:
    """Paths of a line's tests; UpstreamRowsError if the file is invalid, or has none for it."""
    return read_data(
        root / UPSTREAM_ROWS,
        lambda data: TypeAdapter(dict[str, list[str]]).validate_python(data)[line],
        errors.UpstreamRowsError,
        what=f"list of vLLM's tests for line {line}",
        remedy="name files of its release's tests",
    )


def compare_upstream(project: Project, line: str, runner: Runner) -> Path:
    """Run a line's rows on both trees; returns the record. For errors see ``judge_upstream``."""
    paths = read_upstream(project.root, line)
    with ExitStack() as stack:
        stack.enter_context(exclusive(f"upstream-{line}", wait=False))
        with report(f"trees and environment of line {line}"):
            environment = stack.enter_context(open_line(project, line, runner, "upstream"))
            inputs = environment.work / "inputs"  # for both runs
            with atomic_path(inputs) as aside:
                aside.mkdir()
                environment.repo.unpack(environment.applied.base, UPSTREAM_SOURCE, aside)
                write_tools(aside, project.root, UPSTREAM_REQUIREMENTS)
        trees = {PUBLISHED: environment.applied.base, PATCHED: environment.applied.result}

        def run(name: str) -> TestRun:
            script = f"/mnt/{SCRIPT.name}"
            argv = ("/usr/bin/timeout", str(UPSTREAM_S), PYTHON, script, "/mnt", line, "1", *paths)
            return parse(environment.run(name, trees[name], inputs, argv), name)

        with ThreadPoolExecutor(len(trees)) as pool:
            published, patched = pool.map(run, trees)
    rows = judge_upstream(line, paths, published, patched)
    for file, counts in rows.items():
        console.print(f"  {file}: {_counts(counts)}", markup=False)
    path = project.records / "upstream" / f"{line}.json"
    vllm = environment.plan.cell.line.vllm
    write_json(path, {"line": line, "vllm": vllm, "trees": trees, "files": rows})
    return path


def judge_upstream(
    line: str, paths: list[str], published: TestRun, patched: TestRun
) -> dict[str, dict[str, int]]:
    """How many tests of each file have which pair of outcomes, as published and as patched.

    RegressionError if one passes only as published; ProofNotRunError if none passes, or ran.
    """
    for name, run in ((PUBLISHED, published), (PATCHED, patched)):
        if run.exit not in {GREEN, RED}:
            raise not_run(f"line {line}, {name}", run)
    before, after = published.tests, patched.tests
    if lost := [name for name in before if before[name] == "passed" != after.get(name)]:
        what = f"line {line}: {len(lost)} of vLLM's tests pass as published, not as patched"
        remedy = f"correct the patch; its message: {patched.why}"
        raise errors.RegressionError(what, where="\n          ".join(lost[:10]), remedy=remedy)
    rows: dict[str, Counter[str]] = {path: Counter() for path in paths}
    for name in before | after:
        old, new = (outcomes.get(name, "missing") for outcomes in (before, after))
        counts = rows.setdefault(name.partition("::")[0], Counter())
        counts[old if old == new else f"{old}, then {new}"] += 1
    if idle := [path for path, counts in rows.items() if not counts["passed"]]:
        what = f"line {line}: nothing in it passes as published: {dict(rows[idle[0]])}"
        remedy = "take it out of the line's list"
        raise errors.ProofNotRunError(what, where=f"{UPSTREAM_ROWS}: {idle[0]}", remedy=remedy)
    return {path: dict(sorted(counts.items())) for path, counts in rows.items()}
