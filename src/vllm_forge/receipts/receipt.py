"""A receipt: the verdicts of one tier of the GPU suite in one image on GPUs of one SKU.

An in-toto Statement v1 whose predicate is in-toto's Test Result v0.1, so that other tools read
whether it passed and which tests; what it has no field for is under ``vllmForge``, which they
ignore by in-toto's rules. Its file is a DSSE envelope around it, signed where there is a key.

With a signature by a key of the keyring (``signing``), any change to the payload is detected.
Without one, ``payloadSha256`` detects an accident, not a forger, who would write both: an unsigned
receipt is as trustworthy as the commit that added it, and is shown as "unsigned" everywhere.
The payload is canonical JSON (keys sorted, no spaces), so that one statement has one form.

Sources: github.com/in-toto/attestation, spec/v1/statement.md, spec/v1/digest_set.md,
spec/predicates/test-result.md; github.com/secure-systems-lab/dsse, envelope.md, whose readers
ignore the field that it does not define.
"""

import base64
import copy
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field, ValidationError
from securesystemslib.dsse import Envelope
from securesystemslib.signer import Signature

from vllm_forge.errors import problems
from vllm_forge.host import parse_json, printable, read_plain, write_whole
from vllm_forge.matrix import FrozenModel
from vllm_forge.matrix.model import Text
from vllm_forge.receipts import errors
from vllm_forge.signing import FOLDER as KEYS
from vllm_forge.signing import PAYLOAD_TYPE, Keyring, PrivateKey, TrustedKey, bundle, pae
from vllm_forge.signing.errors import UnknownSignerError

DIGEST = "payloadSha256"
LARGEST = 16 << 20  # a receipt of 347 tests has 300 KB
VALID = timedelta(days=90)  # drivers, and what we test for, change faster than releases live
ROUNDING = timedelta(seconds=1)  # of times in results
SOURCE_NAME, SUITE_NAME = "vllm source, line {}", "tests/gpu, tier {}"
GREEN = ("passed", "other GPU")
# What pytest-xdist appends to a test's name with --dist loadgroup (scheduler/loadscope.py).
GROUP = re.compile(r"(?<=[\w\]])@[\w.-]+$")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
GitTree = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Word = Annotated[str, Field(pattern=r"^[\w.-]+$")]  # becomes a part of a file's name
# Becomes a cell of a page's table: without what Markdown and HTML read as more than text.
Cell = Annotated[str, Field(pattern=r"^[\w .,:;()/+=%-]+$", max_length=200)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Of a year to which days can be added.
Time = Annotated[AwareDatetime, Field(lt=datetime(2200, 1, 1, tzinfo=UTC))]


class Resource(FrozenModel):
    """An in-toto ResourceDescriptor: a name and its DigestSet."""

    name: Text
    digest: dict[Literal["sha256"], Sha256] = Field(min_length=1)


class Source(FrozenModel):
    """An in-toto ResourceDescriptor of a git tree."""

    name: Text
    digest: dict[Literal["gitTree"], GitTree] = Field(min_length=1)


class Gpu(FrozenModel):
    """The GPU, without its serial numbers."""

    name: Cell
    uuid_sha256: Sha256
    compute_capability: Word
    driver: Cell
    memory_mib: int = Field(gt=0)


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
    finished: Time
    expires: AwareDatetime


class Predicate(FrozenModel):
    """in-toto's test result; ``configuration`` is the suite."""

    result: Literal["PASSED"]
    configuration: tuple[Resource, ...] = Field(min_length=1, max_length=1)
    passed: tuple[str, ...] = Field(alias="passedTests")
    failed: tuple[str, ...] = Field(alias="failedTests", max_length=0)
    detail: Detail = Field(alias="vllmForge")


class Statement(bundle.Statement):
    subject: tuple[Resource, Source]  # type: ignore[assignment]
    predicate_type: Literal["https://in-toto.io/attestation/test-result/v0.1"] = Field(
        alias="predicateType"
    )
    predicate: Predicate  # type: ignore[assignment]

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
    if len(tests) != len(result["tests"]):
        raise ValueError("a test has two verdicts, of two groups of pytest-xdist")
    red = [name for name, row in tests.items() if row["outcome"] not in GREEN]
    if red or not tests or result["exit"] != 0:
        raise errors.ReceiptIncompleteError(
            f"{len(red)} of {len(tests)} tests are not green; pytest exited with {result['exit']}",
            where=", ".join(red[:5]),
            remedy="make receipts of green runs only; see its table",
        )
    plan, subject = result["plan"], result["plan"]["subject"]
    finished = datetime.fromisoformat(result["finished"])
    suite = {"sha256": result["suite_sha256"]}
    of_result = ("tier", "gpus", "host", "configurations", "started")
    detail = {
        **{key: plan[key] for key in ("sku", "line", "lock_sha256")},
        **{key: result[key] for key in of_result},
        "tests": dict(sorted(tests.items())),
        "finished": finished,
        "expires": (finished + VALID).astimezone(UTC),
    }
    return Statement.model_validate(
        {
            "subject": [
                {"name": subject["name"], "digest": {"sha256": subject["sha256"]}},
                {"name": SOURCE_NAME.format(plan["line"]), "digest": {"gitTree": plan["tree"]}},
            ],
            "_type": bundle.STATEMENT_TYPE,
            "predicateType": "https://in-toto.io/attestation/test-result/v0.1",
            "predicate": {
                "result": "PASSED",
                "configuration": [{"name": SUITE_NAME.format(result["tier"]), "digest": suite}],
                "passedTests": sorted(n for n, row in tests.items() if row["outcome"] == "passed"),
                "failedTests": [],
                "vllmForge": detail,
            },
        }
    )


def wrong_times(detail: Detail, now: datetime) -> str | None:
    """Why a receipt is not valid now by its own times."""
    last = min(detail.expires, detail.finished + VALID)
    in_order = detail.started <= detail.finished <= now < last == detail.expires
    if in_order and detail.finished - detail.started <= VALID:
        return None
    started, finished = (f"{time:%F %T %Z}" for time in (detail.started, detail.finished))
    if detail.finished < detail.started:
        return f"the run ended at {finished}, before its start at {started}: its clock changed"
    if detail.finished > now:
        return f"the run ended at {finished}, and now is {now:%F %T %Z}: one clock is wrong"
    return (
        f"the receipt is of {detail.finished.date()}, valid until {detail.expires.date()}; at "
        f"most {VALID.days} days are accepted"
    )


def contradictions(statement: Statement) -> Iterator[str]:
    """Times that no run has; verdicts that differ from passed tests, margins from bounds."""
    detail = statement.detail
    if what := wrong_times(detail, detail.finished):
        yield what
    for name, test in detail.tests.items():
        for what, pair in test.margins.items():
            if pair.measured > pair.bound:
                yield f"is red: {name}: {what} is {pair.measured:g}, its bound {pair.bound:g}"
        if test.seconds > (detail.finished - detail.started + ROUNDING).total_seconds():
            yield f"is impossible: {name} took {test.seconds:g} s, more than the whole run"
    passed = sorted(name for name, test in detail.tests.items() if test.outcome == "passed")
    if list(statement.predicate.passed) != passed:
        yield "has other passedTests than tests that passed, each once and in order"


def closest_margin(detail: Detail) -> str:
    """The test that came nearest to its bound."""
    shares = [
        (pair.measured / pair.bound, f"{name.rpartition('::')[2]}, {what}")
        for name, test in detail.tests.items()
        for what, pair in test.margins.items()
        if pair.bound > 0
    ]
    if not shares:
        return "-"
    share, name = max(shares)
    return f"{share:.0%} of its bound: {name}"


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A receipt as read; ``signatures`` are those of trusted keys, none if it is unsigned."""

    path: Path
    statement: Statement
    signatures: tuple[tuple[TrustedKey, bytes], ...]

    @property
    def signed_by(self) -> tuple[TrustedKey, ...]:
        return tuple(key for key, _ in self.signatures)


def write_receipt(folder: Path, statement: Statement, key: PrivateKey | None = None) -> Path:
    """Write ``folder/<digest>/<sku>--<line>--<tier>.json``, signed if there is a private key."""
    path = folder / statement.sha256 / statement.file_name
    signed = () if key is None else ((key.public, key.sign(pae(statement.content))),)
    store_receipt(path, statement, signed)
    return path


def store_receipt(
    path: Path, statement: Statement, signatures: Sequence[tuple[TrustedKey, bytes]]
) -> None:
    """Write a receipt with these signatures, which must be of its statement."""
    rows = {key.id: Signature(key.id, signature.hex()) for key, signature in signatures}
    envelope = Envelope(statement.content, PAYLOAD_TYPE, rows)
    data = envelope.to_dict() | {DIGEST: hashlib.sha256(envelope.payload).hexdigest()}
    write_whole(path, json.dumps(data, indent=1, sort_keys=True) + "\n")


def read_receipt(path: Path, keys: Keyring) -> Receipt:
    """Read a receipt; its payload must be the one that was written, or signed.

    Raises:
        ReceiptUnreadableError: not a DSSE envelope of a receipt.
        ReceiptEditedError: the payload does not match its digest.
        UnknownSignerError, SignatureInvalidError: see ``signing``.
    """
    try:
        data: dict[str, Any] = parse_json(read_plain(path, LARGEST))
        payload, kind = base64.b64decode(data["payload"], validate=True), data["payloadType"]
        stated, envelope = data[DIGEST], Envelope.from_dict(copy.deepcopy(data))
        written = envelope.to_dict() | {DIGEST: stated}
        "".join(envelope.signatures)  # their ids are text
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from None
    if written != data:
        raise _unreadable(path, "unknown fields, or base64 of another form")
    if kind != PAYLOAD_TYPE:
        raise _unreadable(path, f"unknown payload type {kind!r}")
    if hashlib.sha256(payload).hexdigest() != stated:
        raise _edited(path, "the payload does not match its digest")
    signatures = tuple(_signatures(path, envelope, keys))
    try:
        statement = Statement.model_validate_json(payload)
    except ValidationError as error:
        raise _unreadable(path, problems(error)[0]) from None
    if statement.content != payload:
        raise _edited(path, "the payload is not in canonical form")
    return Receipt(path=path, statement=statement, signatures=signatures)


def _signatures(
    path: Path, envelope: Envelope, keys: Keyring
) -> Iterator[tuple[TrustedKey, bytes]]:
    for keyid, row in sorted(envelope.signatures.items()):
        if (key := keys.find(keyid=keyid)) is None:
            what = f"signed by key {printable(keyid)}, which is not among the trusted ones"
            remedy = f"if you trust the signer, add the public key to {KEYS}"
            raise UnknownSignerError(what, where=path, remedy=remedy)
        signature = bytes.fromhex(row.signature)
        key.verify(signature, envelope.pae(), str(path))
        yield key, signature


def _unreadable(path: Path, why: str) -> errors.ReceiptUnreadableError:
    remedy = "remove it, if neither `gpu test` nor `gpu receipts` wrote it"
    return errors.ReceiptUnreadableError(f"not a receipt: {why}", where=path, remedy=remedy)


def _edited(path: Path, why: str) -> errors.ReceiptEditedError:
    remedy = "delete it, and run the suite again"
    return errors.ReceiptEditedError(f"the receipt was edited: {why}", where=path, remedy=remedy)
