"""What a run of contract tests says of a patch. Red is pytest's exit code 1, and nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_forge.errors import ForgeError
from vllm_forge.proofs.errors import ProofNotRunError, ProofRedError, UselessPatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.patches import Decision, Patch
    from vllm_forge.patches.variants import Variant

GREEN, RED = 0, 1  # pytest.ExitCode.OK and TESTS_FAILED
WHY_CHARS = 160
# Code that does not load makes any test red: that is no proof of what a patch does.
NOT_LOADED = re.compile(r"^(SyntaxError|IndentationError|ImportError|ModuleNotFoundError)\b")
CHANGING = re.compile(r"\b0x[0-9a-f]+\b|/(?:tmp|opt|mnt|srv)/\S+")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pytest run inside: its exit code, each test's outcome, what the first red one said."""

    exit: int
    tests: dict[str, str]
    why: str
    tail: str

    def outcomes(self, test_id: str) -> Counter[str]:
        """How often which outcome, over all parameters of one test."""
        return Counter(
            outcome
            for name, outcome in self.tests.items()
            if name == test_id or name.startswith(f"{test_id}[")
        )


def parse(output: str, where: str) -> Run:
    """Read the JSON that run_tests.py printed last.

    Raises:
        ProofNotRunError: there is none.
    """
    lines = output.strip().splitlines()
    try:
        data = json.loads(lines[-1])
        return Run(
            exit=data["exit"],
            tests=data["tests"],
            why=CHANGING.sub("...", data["why"])[:WHY_CHARS],
            tail=data["tail"],
        )
    except (IndexError, ValueError, KeyError, TypeError):
        raise ProofNotRunError(
            "the tests printed no verdict", where=where, remedy=output[-2000:]
        ) from None


def judge_whole(line: str, patches: Sequence[Patch], run: Run) -> list[ForgeError]:
    """All contract tests on the whole series: nothing red, and every proof really run."""
    problems: list[ForgeError] = []
    if run.exit == RED:
        red = [name for name, outcome in run.tests.items() if outcome == "failed"]
        problems.append(
            ProofRedError(
                f"line {line}: {len(red)} contract tests are red with the whole series: {run.why}",
                where="\n          ".join(red[:10]),
                remedy="a patch does not do what its proof says, or dispositions.toml says "
                "something else than the series",
            )
        )
    elif run.exit != GREEN:
        problems.append(_not_run(f"line {line}, whole series", run))
        return problems
    for patch in patches:
        seen = run.outcomes(patch.proves)
        if not seen["passed"] and not seen["failed"]:
            problems.append(_no_proof(line, patch, "is not there, or passes nowhere on this line"))
        elif other := {name: count for name, count in seen.items() if name not in _CLEAR}:
            problems.append(_no_proof(line, patch, f"was in part not run: {other}"))
    return problems


_CLEAR = ("passed", "failed")


def judge_grounds(line: str, decided: Sequence[tuple[str, Decision]], run: Run) -> list[ForgeError]:
    """Every contract test that a decision stands on really ran; a red one is told elsewhere."""
    problems: list[ForgeError] = []
    for about, decision in decided:
        if decision.proof is None:
            continue
        seen = run.outcomes(decision.proof)
        if not seen or any(name not in _CLEAR for name in seen):
            problems.append(
                ProofNotRunError(
                    f"line {line}: {about} is {decision.status} for what a test shows, but that "
                    f"test was not run: {dict(seen) or 'not found'}",
                    where=f"dispositions.toml: {about}: {decision.proof}",
                    remedy="name a test that runs on this line",
                )
            )
    return problems


def judge_without(line: str, variant: Variant, run: Run) -> ForgeError | None:
    """The proof on the tree without its patch; None when it is red, as it must be."""
    patch = variant.left_out
    seen = run.outcomes(patch.proves)
    if any(name not in _CLEAR for name in seen):
        return _no_proof(line, patch, f"was in part not run: {dict(seen)}")
    if run.exit == GREEN and seen["passed"]:
        return UselessPatchError(
            f"line {line}: {patch.name} proves nothing: drop it. Its proof is green without it",
            where=f"{patch.path}: Proves: {patch.proves}",
            remedy="delete the file and its line in the series; if the change is needed, write "
            "the test that shows it",
        )
    if run.exit != RED or not seen["failed"]:
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


def _not_run(what: str, run: Run) -> ProofNotRunError:
    return ProofNotRunError(
        f"{what}: pytest exited with {run.exit}, which is neither green (0) nor red (1)",
        where=run.why,
        remedy=run.tail,
    )
