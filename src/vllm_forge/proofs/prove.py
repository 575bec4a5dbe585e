"""Every patch red without, green with: the contract tests in the environment that ships."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_forge.errors import ForgeError
from vllm_forge.host import console, exclusive, report
from vllm_forge.matrix import image_cell
from vllm_forge.patches import (
    Applied,
    Decision,
    Patch,
    check_line,
    decisions,
    read_dispositions,
    read_series,
)
from vllm_forge.patches.variants import Pair, Variant, pairs, require_idempotent, without
from vllm_forge.proofs.environment import Environment, prepare, require_root
from vllm_forge.proofs.errors import ProofNotRunError, UselessPatchError
from vllm_forge.proofs.record import Proven, show, write_record
from vllm_forge.proofs.verdict import (
    GREEN,
    Run,
    judge_grounds,
    judge_whole,
    judge_without,
    parse,
)
from vllm_forge.sources import SourceRepo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from vllm_forge.host import Runner
    from vllm_forge.images.engine import ContainerRun
    from vllm_forge.matrix import Matrix

MOST_WORKERS = 8  # each takes about 2 GB
ALL_TESTS = "tests/patches"
WHOLE = "whole"
# What to tell first when several things are wrong.
FIRST = (UselessPatchError, ProofNotRunError)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A line, ready to be proven."""

    line_name: str
    environment: Environment
    patches: tuple[Patch, ...]
    applied: Applied
    pairs: tuple[Pair, ...]
    variants: tuple[Variant, ...]
    decided: tuple[tuple[str, Decision], ...]


def prove(root: Path, matrix: Matrix, names: Sequence[str], runner: Runner) -> None:
    """Prove lines and write ``records/proofs/<line>.json`` for each that is proven.

    Raises:
        EngineSetupError: not root.
        UselessPatchError: a proof is green without its patch.
        ProofNotRunError: a proof was not run.
        ProofRedError: a contract test is red with the whole series.
        SeriesOrderError, InseparablePatchError: see patches.variants.
        DispositionError: a change about which nothing is decided, or without a ground.
        BusyError: another process proves one of the lines.
    """
    require_root()
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(exclusive(f"prove-{name}", wait=False))
        repo = SourceRepo()
        works = [_make_work(root, matrix, name, repo, runner) for name in names]
        proven = _run_all(works, repo, runner)
    problems: list[ForgeError] = []
    for work, found in zip(works, proven, strict=True):
        show(found)
        wrong = _problems(work, found)
        if not wrong:
            print(f"line {work.line_name}: proven, {write_record(root, found)}")
        problems += wrong
    if problems:
        problems.sort(key=lambda problem: not isinstance(problem, FIRST))
        for problem in problems[1:]:
            console.print(f"{type(problem).__name__}: {problem}", markup=False)
        raise problems[0]


def _make_work(root: Path, matrix: Matrix, name: str, repo: SourceRepo, runner: Runner) -> Work:
    """Everything but the tests, which take no time."""
    line = matrix.line[name]
    with report(f"trees and environment of line {name}"):
        patches = read_series(root / line.series)
        applied = check_line(root, name, line, repo)
        require_idempotent(repo, applied, patches)
        return Work(
            line_name=name,
            patches=patches,
            applied=applied,
            pairs=pairs(repo, applied, patches),
            variants=tuple(without(repo, applied, patches, i) for i in range(len(patches))),
            decided=decisions(read_dispositions((root / line.series).parent), name),
            environment=prepare(
                image_cell(matrix, root, line.skus[0], name), runner, repo, applied.base
            ),
        )


def _run_all(works: Sequence[Work], repo: SourceRepo, runner: Runner) -> list[Proven]:
    """All trees of all lines, side by side; the long runs first."""
    cores = len(os.sched_getaffinity(0))
    workers = min(cores, MOST_WORKERS)
    threads = str(max(1, cores // workers))
    with ThreadPoolExecutor(workers) as pool:

        def start(work: Work, name: str, tree: str, test: str) -> Future[Run]:
            folder = work.environment.write_tree(repo, work.applied.base, tree, name)
            arguments = (work.line_name, threads, test)
            run = work.environment.container_run(name, folder, arguments)
            return pool.submit(_run, runner, work, name, run)

        wholes = [start(work, WHOLE, work.applied.result, ALL_TESTS) for work in works]
        partial = [
            [start(work, v.left_out.path.stem, v.tree, v.left_out.proves) for v in work.variants]
            for work in works
        ]
        return [
            Proven(
                line_name=work.line_name,
                plan=work.environment.plan,
                applied=work.applied,
                pairs=work.pairs,
                variants=work.variants,
                decided=work.decided,
                whole=whole.result(),
                without=tuple(job.result() for job in jobs),
            )
            for work, whole, jobs in zip(works, wholes, partial, strict=True)
        ]


def _run(runner: Runner, work: Work, name: str, container: ContainerRun) -> Run:
    """One pytest run on one tree."""
    start = time.monotonic()
    engine = work.environment.plan.engine
    run = parse(engine.run_in_image(runner, container), f"line {work.line_name}, {name}")
    what = name if name == WHOLE else f"without {name}"
    console.print(
        f"  line {work.line_name}, {what}: {'green' if run.exit == 0 else f'exit {run.exit}'} "
        f"({time.monotonic() - start:.0f} s)"
    )
    return run


def _problems(work: Work, found: Proven) -> list[ForgeError]:
    problems = judge_whole(work.line_name, work.patches, found.whole)
    if found.whole.exit == GREEN:
        problems += judge_grounds(work.line_name, work.decided, found.whole)
    for variant, run in zip(found.variants, found.without, strict=True):
        if (problem := judge_without(work.line_name, variant, run)) is not None:
            problems.append(problem)
    return problems
