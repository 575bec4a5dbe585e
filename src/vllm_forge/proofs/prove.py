"""Every patch red without, green with: the contract tests in the environment that ships.

A run has the tests, pytest and cmake, the reference models, and the files of the release that no
wheel has: the sources of its native code.
"""

from __future__ import annotations

import io
import os
import shutil
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from vllm_forge.errors import ForgeError
from vllm_forge.host import Runner, atomic_path, console, exclusive, report
from vllm_forge.patches import decisions, read_dispositions, read_series
from vllm_forge.patches.variants import pairs, require_idempotent, without
from vllm_forge.project import Project
from vllm_forge.proofs.environment import PYTHON, open_line
from vllm_forge.proofs.errors import ProofNotRunError, UselessPatchError
from vllm_forge.proofs.result import LineProof, ProofJob, TestRun, parse, show, write_record
from vllm_forge.sources import SourceRepo, Wheelhouse, read_wheels

MOST_WORKERS = 8  # each takes about 2 GB
ALL_TESTS = "tests/patches"
WHOLE = "whole"
# Reported first if there are several problems.
FIRST = (UselessPatchError, ProofNotRunError)
SCRIPT = Path(__file__).with_name("run_tests.py")
REQUIREMENTS = "tests/patches/requirements.txt"
# Sources of the release's native code, and the GPUs that it is built for.
NATIVE = ("CMakeLists.txt", "cmake", "csrc", ".buildkite/release-pipeline.yaml")
# Reference models of the tests; what the tests use of them imports no library of this project.
MODELS = ("src/vllm_forge/checkpoints/codecs", "tests/gpu/reference")
MUTANTS = "tests/gpu/race"  # written for the release's text, which a contract test checks


def prove(project: Project, names: Sequence[str], runner: Runner) -> None:
    """Prove lines and write ``records/proofs/<line>.json`` for each that is proven.

    Raises:
        UselessPatchError, ProofNotRunError, ProofRedError: a verdict; the others are printed.
        BusyError: another process proves one of the lines.
    """
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(exclusive(f"prove-{name}", wait=False))
        jobs = [_prepare(project, name, runner) for name in names]
        proofs = _run_all(jobs, runner)
    problems: list[ForgeError] = []
    for proof in proofs:
        show(proof)
        line_problems = proof.problems()
        if not line_problems:
            path = write_record(project.records, proof).relative_to(project.root)
            print(f"line {proof.job.line_name}: proven, {path}")
        problems += line_problems
    if problems:
        problems.sort(key=lambda problem: not isinstance(problem, FIRST))
        for problem in problems[1:]:
            console.print(f"{type(problem).__name__}: {problem}", markup=False)
        raise problems[0]


def _prepare(project: Project, name: str, runner: Runner) -> ProofJob:
    """Everything but the tests, which take the time."""
    series = project.root / project.matrix.line[name].series
    with report(f"trees and environment of line {name}"):
        patches = read_series(series)
        environment = open_line(project, name, runner, "proofs")
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
    _, wheels = read_wheels(root / REQUIREMENTS, "name wheels, sorted, with hashes")
    wheelhouse = Wheelhouse()
    wheelhouse.fetch(wheels)
    with atomic_path(folder) as aside:
        aside.mkdir()
        for path in ("tests/__init__.py", "pyproject.toml"):
            (aside / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(root / path, aside / path)
        shutil.copyfile(SCRIPT, aside / SCRIPT.name)
        skip = shutil.ignore_patterns("__pycache__")
        for path in ("tests/patches", MUTANTS, "patches", *MODELS):
            shutil.copytree(root / path, aside / path, ignore=skip)
        native = repo.git("archive", "--format=zip", "-0", base, *NATIVE).stdout
        with zipfile.ZipFile(io.BytesIO(native)) as archive:
            archive.extractall(aside / "source")
        for wheel in wheels:
            with zipfile.ZipFile(wheelhouse.verify(wheel)) as archive:
                for member in archive.infolist():
                    file = Path(archive.extract(member, aside / "tools"))
                    if member.external_attr >> 16 & 0o111:  # a program
                        file.chmod(0o755)
    return folder


def _run_all(jobs: Sequence[ProofJob], runner: Runner) -> list[LineProof]:
    """Run all trees of all lines in parallel, the long runs first."""
    cores = len(os.sched_getaffinity(0))
    workers = min(cores, MOST_WORKERS)
    threads = str(max(1, cores // workers))
    with ThreadPoolExecutor(workers) as pool:

        def start(job: ProofJob, name: str, tree: str, test: str) -> Future[TestRun]:
            folder = job.environment.write_tree(tree, name)
            return pool.submit(_run, runner, job, name, folder, job.line_name, threads, test)

        wholes = [start(job, WHOLE, job.environment.applied.result, ALL_TESTS) for job in jobs]
        variants = [
            [start(job, v.left_out.path.stem, v.tree, v.left_out.proves) for v in job.variants]
            for job in jobs
        ]
        return [
            LineProof(job=job, whole=whole.result(), without=tuple(run.result() for run in runs))
            for job, whole, runs in zip(jobs, wholes, variants, strict=True)
        ]


def _run(runner: Runner, job: ProofJob, name: str, folder: Path, *arguments: str) -> TestRun:
    start = time.monotonic()
    argv = (PYTHON, f"/mnt/{SCRIPT.name}", *arguments)
    output = job.environment.run(runner, name, folder, job.inputs, argv)
    run = parse(output, f"line {job.line_name}, {name}")
    what = name if name == WHOLE else f"without {name}"
    console.print(
        f"  line {job.line_name}, {what}: {'green' if run.exit == 0 else f'exit {run.exit}'} "
        f"({time.monotonic() - start:.0f} s)"
    )
    return run
