"""The record of a line's proofs, and whether it is of the present series, lock and tests."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from vllm_forge.host import hash_of, write_json
from vllm_forge.host.files import file_digest
from vllm_forge.matrix import FrozenModel
from vllm_forge.patches import Decision, read_series, read_tree_lock
from vllm_forge.patches.series import Variant
from vllm_forge.project import Project
from vllm_forge.proofs.environment import LineEnvironment

# What a run reads of the checkout. Reference models import no library of this project; of the
# folder of helpers others do. The mutants are written for the release's text, which a contract test
# checks. Not pyproject.toml, which changes with every tool.
CHECKOUT = (
    "tests/__init__.py",
    *(f"tests/support/{name}.py" for name in ("__init__", "marlin_host", "marlin_protocol")),
    "tests/gpu/upstream/run_tests.py",
    "tests/patches",
    "tests/gpu/race",
    "tests/gpu/reference",
    "src/vllm_forge/checkpoints/codecs",
    "patches/vllm/dispositions.toml",
)


def digest_of_tests(root: Path) -> str:
    """Hash of the tests and all else of CHECKOUT, in a checkout or its copy."""
    files = [
        file
        for name in CHECKOUT
        for file in (root / name, *(root / name).rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    ]
    rows = {file.relative_to(root).as_posix(): file_digest(file) for file in files}
    return hash_of(rows, sort_keys=True)


def fresh_record(project: Project, line_name: str) -> dict[str, str] | None:
    """Patch -> why its proof is red without it; None if the record is of other inputs.

    It is only written when all are red without and green with their patch.
    """
    line = project.matrix.line[line_name]
    folder = project.root / line.series
    inputs, proofs, why = project.read_json(
        f"records/proofs/{line_name}.json",
        lambda data: (
            (data["trees"]["result"], data["environment"]["lock_sha256"], data.get("tests")),
            {row["name"]: row["proves"] for row in data["patches"] if row["with"].get("passed")},
            {row["name"]: str(row["without"]["why"]) for row in data["patches"]},
        ),
    )
    tree = read_tree_lock(folder, line_name).result
    now = (tree, project.lock(line_name).digest, digest_of_tests(project.root))
    wanted = {patch.name: patch.proves for patch in read_series(folder)}
    return why if (inputs, proofs) == (now, wanted) else None


class TestRun(FrozenModel):
    """A pytest run inside: exit code, outcomes, reasons of what did not pass, first red message."""

    __test__: ClassVar[bool] = False  # not a test, whatever its name

    exit: int
    tests: dict[str, str]
    reasons: dict[str, str] = Field(default_factory=dict)
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
    pairs: list[dict[str, Any]]
    variants: tuple[Variant, ...]
    decided: tuple[tuple[str, Decision], ...]


def write_record(records: Path, job: ProofJob, whole: TestRun, runs: Sequence[TestRun]) -> Path:
    """Write records/proofs/<line>.json; returns its path."""
    line, applied = job.environment.plan.cell.line, job.environment.applied
    counts = Counter(whole.tests.values())
    data = {
        "line": job.line_name,
        "vllm": line.vllm,
        "environment": {
            "lock": line.lock,
            "lock_sha256": job.environment.plan.lock.digest,
            "python": line.python,
            "torch": line.torch,
        },
        "trees": {"base": applied.base, "result": applied.result},
        "tests": digest_of_tests(job.inputs),
        "contract_tests": {"passed": counts["passed"], "of other lines": counts["skipped"]},
        "patches": [
            {
                "name": variant.left_out.name,
                "bug": variant.left_out.fields["Bug"],
                "proves": variant.left_out.proves,
                "with": dict(sorted(whole.outcomes(variant.left_out.proves).items())),
                "without": {
                    "tree": variant.tree,
                    "made as": variant.way,
                    "exit": run.exit,
                    **dict(sorted(run.outcomes(variant.left_out.proves).items())),
                    "why": run.why,
                },
            }
            for variant, run in zip(job.variants, runs, strict=True)
        ],
        "not carried": [
            {
                "about": about,
                "status": decision.status,
                "shown by": decision.proof,
                **dict(sorted(whole.outcomes(decision.proof).items())),
            }
            for about, decision in job.decided
            if decision.proof is not None
        ],
        "order": job.pairs,
        "applied twice": "same trees; each patch is refused on its own result",
    }
    path = records / "proofs" / f"{job.line_name}.json"
    write_json(path, data)
    return path
