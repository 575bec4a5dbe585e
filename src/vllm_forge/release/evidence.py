"""The statements about an image: whose signatures hold, and what a stage still lacks.

A statement counts if a trusted signer made it for this image. One that does not count is refused
with its reason, and hides none that does: whoever may write to a registry can add to an image what
they like. What a stage requires and nobody signed is missing, and absence fails.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from vllm_forge.errors import ForgeError
from vllm_forge.host import parse_json, printable
from vllm_forge.release import errors
from vllm_forge.release.published import Attached
from vllm_forge.release.statements import PROVENANCE, SBOM, TEST_RESULT, VEX, VSA
from vllm_forge.signing import Keyring, Role, Verified, bundle
from vllm_forge.signing.bundle import verify_keyless

RECEIPT, DECISION = "receipt", "decision"


# Predicate type -> what it is called here, and the role of keys that may sign it.
KINDS: dict[str, tuple[str, Role]] = {
    SBOM: ("sbom", "builder"),
    PROVENANCE: ("provenance", "builder"),
    TEST_RESULT: (RECEIPT, "receipts"),
    VEX: ("vex", "vex"),
    VSA: (DECISION, "release"),
}


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Who may sign: keys, each for its roles; and perhaps one identity of one issuer, for all."""

    keys: Keyring
    identity: tuple[str, str] | None = None  # exact identity and issuer

    def verify(self, content: bundle.Bundle, role: Role, now: datetime) -> Verified:
        if self.identity is not None and content.hint is None:
            identity, issuer = self.identity
            return verify_keyless(content, identity=identity, issuer=issuer)
        return bundle.verify(content, self.keys, role=role, now=now)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is attached to an image.

    ``named``: name -> different statements, each with all who signed it. The name is the kind, or
    ``receipt-<tier>``. ``refused``: name and reason of those that do not count. ``unrelated``:
    predicate types that nothing here reads.
    """

    named: dict[str, dict[bytes, list[Verified]]] = field(default_factory=dict)
    refused: tuple[tuple[str, ForgeError], ...] = ()
    unrelated: tuple[str, ...] = ()

    def signed(self, name: str) -> list[Verified]:
        """One of each different statement."""
        return [rows[0] for rows in self.named.get(name, {}).values()]

    def signers(self, name: str) -> list[Verified]:
        """Every signature of a statement of this name."""
        return [row for rows in self.named.get(name, {}).values() for row in rows]

    def require(self, name: str) -> None:
        """Raise why there is no statement of this name: the reason of one that is refused."""
        if not self.named.get(name):
            for refused, error in self.refused:
                if refused == name:
                    raise error
            raise errors.StatementMissingError(
                f"missing {name}: nothing of it is attached",
                remedy="copy images with `vllm-forge mirror`, which keeps what is attached; to "
                "attach it, release the image: nox -s release -- --help",
            )

    def only(self, name: str) -> Verified:
        """The one statement of this name; StatementDuplicateError, and see ``require``."""
        self.require(name)
        if len(rows := self.signed(name)) > 1:
            signers = ", ".join(row.signer for row in rows)
            what = f"{len(rows)} different statements of {name} are attached, signed by {signers}"
            remedy = "find out which is right, and delete the other"
            raise errors.StatementDuplicateError(what, remedy=remedy)
        return rows[0]


def gather(attached: Sequence[Attached], digest: str, trust: Trust, now: datetime) -> Evidence:
    """Verify the signature, subject and type of each bundle that is attached to an image."""
    named: dict[str, dict[bytes, list[Verified]]] = {}
    refused: list[tuple[str, ForgeError]] = []
    unrelated: set[str] = set()
    for item in attached:
        name = KINDS[item.stated][0] if item.stated in KINDS else item.stated
        try:
            if item.error is not None:
                raise item.error
            content = bundle.read(item.content, item.where)
            predicate_type, name = _peek(content.statement, name)
            if predicate_type not in KINDS:
                unrelated.add(predicate_type)
                continue
            verified = trust.verify(content, KINDS[predicate_type][1], now)
            _require_place(verified, name, item)
            _require_subject(verified, digest, item.where)
        except ForgeError as error:
            error.what = f"{printable(name)}: {error.what}"
            refused.append((name, error))
        else:
            named.setdefault(name, {}).setdefault(verified.content, []).append(verified)
    return Evidence(named=named, refused=tuple(refused), unrelated=tuple(sorted(unrelated)))


def _peek(statement: bytes, name: str) -> tuple[str, str]:
    """Predicate type and name of a statement whose signature was not verified yet."""
    try:
        document = parse_json(statement)
        predicate_type = str(document["predicateType"])
        if predicate_type == TEST_RESULT:
            return predicate_type, f"{RECEIPT}-{document['predicate']['vllmForge']['tier']}"
    except (ValueError, LookupError, TypeError) as error:
        what = f"not a statement: {error!r}"
        raise errors.StatementContentError(what, remedy="get it again") from None
    return predicate_type, KINDS[predicate_type][0] if predicate_type in KINDS else name


def bundle_name(content: bytes) -> str:
    """Name for the file of a bundle, of which nothing was verified."""
    try:
        name = _peek(bundle.read(content).statement, "bundle")[1]
    except ForgeError:
        name = "bundle"
    return name if re.fullmatch(r"[a-z0-9-]{1,60}", name) else "bundle"


def _require_place(verified: Verified, name: str, item: Attached) -> None:
    """A provenance may be ``provenance-<key>``; other names, and annotations, are exact."""
    if item.stated not in {verified.statement.predicate_type, name} and not item.stated.startswith(
        f"{name}-"
    ):
        raise errors.StatementKindError(
            f"it is said to be {printable(item.stated)!r}, and its statement is of type "
            f"{verified.statement.predicate_type}",
            where=item.where,
            remedy="somebody swapped two statements, or their names: get them again",
        )


def _require_subject(verified: Verified, digest: str, where: str) -> None:
    if not (statement := verified.statement).has_subject(digest):
        named = ", ".join(f"{k}:{v}" for row in statement.subject for k, v in row.digest.items())
        what = f"it is about another image: {printable(named)}, not {digest}"
        remedy = "somebody moved it here: get the statements of this image"
        raise errors.StatementSubjectError(what, where=where, remedy=remedy)


def slsa_level(provenances: Sequence[Verified]) -> int:
    """SLSA build level that these signatures of provenance prove; level 2 needs hosted builders."""
    return 2 if provenances and all(row.hosted for row in provenances) else 1
