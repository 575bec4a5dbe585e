"""A receipt: the verdicts of one tier of the GPU suite in one image on GPUs of one SKU.

An in-toto Statement v1 whose predicate is in-toto's Test Result v0.1, so that other tools read
whether it passed and which tests; what it has no field for is under ``vllmForge``, which they
ignore by in-toto's rules.

Sources: github.com/in-toto/attestation, spec/v1/statement.md, spec/v1/digest_set.md,
spec/predicates/test-result.md.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field

from vllm_forge.matrix import FrozenModel
from vllm_forge.receipts.errors import ReceiptIncompleteError

VALID = timedelta(days=90)  # drivers, and what we test for, change faster than releases live
GREEN = ("passed", "other GPU")
# What pytest-xdist appends to a test's name with --dist loadgroup (scheduler/loadscope.py).
GROUP = re.compile(r"(?<=[\w\]])@[\w.-]+$")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
GitTree = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Word = Annotated[str, Field(pattern=r"^[\w.-]+$")]  # becomes a part of a file's name
# Becomes a cell of a page's table: without what Markdown and HTML read as more than text.
Cell = Annotated[str, Field(pattern=r"^[\w .,:;()/+=%-]+$", max_length=200)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Resource(FrozenModel):
    """An in-toto ResourceDescriptor: a name and its DigestSet."""

    name: str
    digest: dict[Literal["sha256"], Sha256] = Field(min_length=1)


class Source(FrozenModel):
    """An in-toto ResourceDescriptor of a git tree."""

    name: str
    digest: dict[Literal["gitTree"], GitTree] = Field(min_length=1)


class Gpu(FrozenModel):
    """The GPU, without its serial numbers."""

    name: Cell
    uuid_sha256: Sha256
    compute_capability: Word
    driver: Cell
    memory_mib: int


class Margin(FrozenModel):
    """A measured value and the bound that it is under."""

    measured: Measure
    bound: Measure


class CaseVerdict(FrozenModel):
    outcome: Literal["passed", "other GPU"]
    seconds: Measure
    margins: dict[Cell, Margin] = Field(default_factory=dict)
    facts: dict[str, Any] = Field(default_factory=dict)
    why: str = ""


class Configuration(FrozenModel):
    """An engine's boot log; see tests.gpu.harness.bootlog for all of its fields."""

    model_config = ConfigDict(extra="allow")

    moe: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    kv_cache: str | None = None


class Detail(FrozenModel):
    """What in-toto's predicate has no field for."""

    sku: Word
    line: Word
    tier: Word
    lock_sha256: Sha256
    gpus: tuple[Gpu, ...] = Field(min_length=1)
    host: dict[str, Any]
    configurations: dict[str, Configuration]
    tests: dict[str, CaseVerdict] = Field(min_length=1)
    started: AwareDatetime
    finished: AwareDatetime
    expires: AwareDatetime


class Predicate(FrozenModel):
    """in-toto's test result; ``configuration`` is the suite."""

    result: Literal["PASSED"]
    configuration: tuple[Resource, ...] = Field(min_length=1, max_length=1)
    passed: tuple[str, ...] = Field(alias="passedTests")
    failed: tuple[str, ...] = Field(alias="failedTests", max_length=0)
    detail: Detail = Field(alias="vllmForge")


class Statement(FrozenModel):
    kind: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: tuple[Resource, Source]
    predicate_type: Literal["https://in-toto.io/attestation/test-result/v0.1"] = Field(
        alias="predicateType"
    )
    predicate: Predicate

    @property
    def detail(self) -> Detail:
        return self.predicate.detail

    @property
    def sha256(self) -> str:
        """Digest of the image's manifest."""
        return self.subject[0].digest["sha256"]

    @property
    def tree(self) -> str:
        """Git tree hash of the patched vLLM source."""
        return self.subject[1].digest["gitTree"]

    @property
    def suite(self) -> str:
        """Hash of the tier; see receipts.suite."""
        return self.predicate.configuration[0].digest["sha256"]

    @property
    def file_name(self) -> str:
        """Its name in the folder of its subject."""
        return f"{self.detail.sku}--{self.detail.line}--{self.detail.tier}.json"


def make_statement(result: dict[str, Any]) -> Statement:
    """The statement of what ``tests.gpu.harness.run`` wrote; ReceiptIncompleteError if red."""
    tests = {GROUP.sub("", name): row for name, row in result["tests"].items()}
    red = [name for name, row in tests.items() if row["outcome"] not in GREEN]
    if red or not tests or result["exit"] != 0:
        raise ReceiptIncompleteError(
            f"{len(red)} of {len(tests)} tests are not green; pytest exited with {result['exit']}",
            where=", ".join(red[:5]),
            remedy="make receipts of green runs only; see its table",
        )
    plan, subject = result["plan"], result["plan"]["subject"]
    finished = datetime.fromisoformat(result["finished"])
    tier, suite = result["tier"], {"sha256": result["suite_sha256"]}
    detail = {
        "sku": plan["sku"],
        "line": plan["line"],
        "tier": tier,
        "lock_sha256": plan["lock_sha256"],
        "gpus": result["gpus"],
        "host": result["host"],
        "configurations": result["configurations"],
        "tests": dict(sorted(tests.items())),
        "started": result["started"],
        "finished": finished,
        "expires": (finished + VALID).astimezone(UTC),
    }
    return Statement.model_validate(
        {
            "subject": [
                {"name": subject["name"], "digest": {"sha256": subject["sha256"]}},
                {"name": f"vllm source, line {plan['line']}", "digest": {"gitTree": plan["tree"]}},
            ],
            "_type": "https://in-toto.io/Statement/v1",
            "predicateType": "https://in-toto.io/attestation/test-result/v0.1",
            "predicate": {
                "result": "PASSED",
                "configuration": [{"name": f"tests/gpu, tier {tier}", "digest": suite}],
                "passedTests": sorted(n for n, row in tests.items() if row["outcome"] == "passed"),
                "failedTests": [],
                "vllmForge": detail,
            },
        }
    )
