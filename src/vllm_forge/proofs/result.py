"""The runs of a line's proof: their verdict, as a table, and as a committed record.

Red is pytest's exit code 1, and nothing else. Equal inputs give equal records.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from vllm_forge.errors import ForgeError
from vllm_forge.host import console, write_json
from vllm_forge.matrix import FrozenModel
from vllm_forge.patches import Decision, Patch
from vllm_forge.patches.variants import Pair, Variant
from vllm_forge.proofs.environment import LineEnvironment
from vllm_forge.proofs.errors import ProofNotRunError, ProofRedError, UselessPatchError

GREEN, RED = 0, 1  # pytest.ExitCode.OK and TESTS_FAILED
CLEAR = {"passed", "failed"}
WHY_CHARS = 160
# Code that does not load makes any test red, which proves nothing about a patch.
NOT_LOADED = re.compile(r"^(SyntaxError|IndentationError|ImportError|ModuleNotFoundError)\b")
CHANGING = re.compile(r"\b0x[0-9a-f]+\b|/(?:tmp|opt|mnt|srv)/\S+")


class TestRun(FrozenModel):
    """A pytest run inside: exit code, each test's outcome, message of the first red test."""

    __test__: ClassVar[bool] = False  # not a test, whatever its name

    exit: int
    tests: dict[str, str]
    why: str
    tail: str

    def outcomes(self, test_id: str) -> Counter[str]:
        """Counts of each outcome, over all parameters of one test."""
        return Counter(
            outcome
            for name, outcome in self.tests.items()
            if name == test_id or name.startswith(f"{test_id}[")
        )


@dataclass(frozen=True, kw_only=True)
class ProofJob:
    """A line, ready to be proven; ``inputs`` is mounted into every run."""

    line_name: str
    environment: LineEnvironment
    inputs: Path
    pairs: tuple[Pair, ...]
    variants: tuple[Variant, ...]
    decided: tuple[tuple[str, Decision], ...]


@dataclass(frozen=True, kw_only=True)
class LineProof:
    """Every run of a line. ``without`` has a run for each variant, in the series' order."""

    job: ProofJob
    whole: TestRun
    without: tuple[TestRun, ...]

    def problems(self) -> list[ForgeError]:
        line, variants = self.job.line_name, self.job.variants
        problems = judge_whole(line, [variant.left_out for variant in variants], self.whole)
        if self.whole.exit == GREEN:
            problems += judge_grounds(line, self.job.decided, self.whole)
        runs = zip(variants, self.without, strict=True)
        return [*problems, *filter(None, (judge_without(line, *row) for row in runs))]


def parse(output: str, where: str) -> TestRun:
    """Read the JSON on the last line of run_tests.py's output, else ProofNotRunError."""
    try:
        run = TestRun.model_validate_json(output.strip().splitlines()[-1])
    except (IndexError, ValidationError):
        raise ProofNotRunError(
            "the tests printed no verdict", where=where, remedy=output[-2000:]
        ) from None
    return run.model_copy(update={"why": CHANGING.sub("...", run.why)[:WHY_CHARS]})


def judge_whole(line: str, patches: Sequence[Patch], run: TestRun) -> list[ForgeError]:
    """All contract tests on the whole series: none is red, and every proof ran."""
    problems: list[ForgeError] = []
    if run.exit == RED:
        red = [name for name, outcome in run.tests.items() if outcome == "failed"]
        problems.append(
            ProofRedError(
                f"line {line}: {len(red)} contract tests are red with the whole series: {run.why}",
                where="\n          ".join(red[:10]),
                remedy="correct the patch, or dispositions.toml where it contradicts the series",
            )
        )
    elif run.exit != GREEN:
        return [_not_run(f"line {line}, whole series", run)]
    for patch in patches:
        outcomes = run.outcomes(patch.proves)
        if not outcomes["passed"] and not outcomes["failed"]:
            problems.append(_no_proof(line, patch, "is missing, or passes nowhere on this line"))
        elif other := {name: count for name, count in outcomes.items() if name not in CLEAR}:
            problems.append(_no_proof(line, patch, f"ran only in part: {other}"))
    return problems


def judge_grounds(
    line: str, decided: Sequence[tuple[str, Decision]], run: TestRun
) -> Iterator[ForgeError]:
    """Every contract test that a decision relies on ran. ``judge_whole`` reports red ones."""
    for about, decision in decided:
        if decision.proof is None:
            continue
        outcomes = run.outcomes(decision.proof)
        if not outcomes or not outcomes.keys() <= CLEAR:
            yield ProofNotRunError(
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
        return UselessPatchError(
            f"line {line}: {patch.name} proves nothing: drop it. Its proof is green without it",
            where=f"{patch.path}: Proves: {patch.proves}",
            remedy="delete the file and its line in the series; if the change is needed, write "
            "the test that shows it",
        )
    if run.exit != RED or not outcomes["failed"]:
        return _not_run(f"line {line}, without {patch.name}", run)
    if NOT_LOADED.match(run.why):
        return _no_proof(line, patch, f"is red only because code does not load ({run.why})")
    return None


def _no_proof(line: str, patch: Patch, what: str) -> ProofNotRunError:
    return ProofNotRunError(
        f"line {line}: the proof of {patch.name} {what}",
        where=f"{patch.path}: Proves: {patch.proves}",
        remedy="name a test that passes with the patch and fails without it, on this line",
    )


def _not_run(what: str, run: TestRun) -> ProofNotRunError:
    return ProofNotRunError(
        f"{what}: pytest exited with {run.exit}, which is neither green (0) nor red (1)",
        where=run.why,
        remedy=run.tail,
    )


def show(proof: LineProof) -> None:
    """Print the table of a line."""
    table = Table(
        title=f"line {proof.job.line_name}, vLLM {proof.job.environment.plan.cell.line.vllm}"
    )
    for column in ("patch", "without it", "with the series", "why it is red"):
        table.add_column(column, overflow="fold")
    for variant, run in zip(proof.job.variants, proof.without, strict=True):
        patch = variant.left_out
        counts = (_counts(each.outcomes(patch.proves)) for each in (run, proof.whole))
        table.add_row(patch.name, *counts, escape(run.why))
    counts_of_all = _counts(Counter(proof.whole.tests.values()))
    table.add_row("all contract tests", "", counts_of_all, "", style="bold")
    console.print(table)


def _counts(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))


def write_record(records: Path, proof: LineProof) -> Path:
    """Write records/proofs/<line>.json; returns its path."""
    line, applied = proof.job.environment.plan.cell.line, proof.job.environment.applied
    counts = Counter(proof.whole.tests.values())
    data = {
        "line": proof.job.line_name,
        "vllm": line.vllm,
        "environment": {
            "lock": line.lock,
            "lock_sha256": proof.job.environment.plan.lock.digest,
            "python": line.python,
            "torch": line.torch,
        },
        "trees": {"base": applied.base, "result": applied.result},
        "contract_tests": {"passed": counts["passed"], "of other lines": counts["skipped"]},
        "patches": [
            {
                "name": variant.left_out.name,
                "bug": variant.left_out.fields["Bug"],
                "proves": variant.left_out.proves,
                "with": dict(sorted(proof.whole.outcomes(variant.left_out.proves).items())),
                "without": {
                    "tree": variant.tree,
                    "made as": variant.way,
                    "exit": run.exit,
                    **dict(sorted(run.outcomes(variant.left_out.proves).items())),
                    "why": run.why,
                },
            }
            for variant, run in zip(proof.job.variants, proof.without, strict=True)
        ],
        "not carried": [
            {
                "about": about,
                "status": decision.status,
                "shown by": decision.proof,
                **dict(sorted(proof.whole.outcomes(decision.proof).items())),
            }
            for about, decision in proof.job.decided
            if decision.proof is not None
        ],
        "order": [asdict(pair) for pair in proof.job.pairs],
        "applied twice": "same trees; each patch is refused on its own result",
    }
    path = records / "proofs" / f"{proof.job.line_name}.json"
    write_json(path, data)
    return path
