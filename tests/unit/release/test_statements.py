"""Statements: one form for one value."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from vllm_forge.release.statements import VSA, Statement, Subject

DIGEST = "5" * 64


def test_statement_is_canonical_json() -> None:
    subject = Subject(name="image", digest={"sha256": DIGEST})
    statement = Statement(subject=(subject,), predicate_type=VSA, predicate={"b": 1, "a": "ä"})
    data = json.loads(statement.content)
    assert data["_type"] == "https://in-toto.io/Statement/v1"
    assert data["predicateType"] == VSA
    assert statement.content.endswith(
        b'{"digest":{"sha256":"' + DIGEST.encode() + b'"},"name":"image"}]}'
    )
    assert Statement.model_validate_json(statement.content) == statement


def test_subject_is_found_by_digest() -> None:
    subject = Subject(name="image", digest={"sha256": DIGEST})
    statement = Statement(subject=(subject,), predicate_type=VSA, predicate={})
    assert statement.has_subject(f"sha256:{DIGEST}")
    assert not statement.has_subject("sha256:" + "6" * 64)
    assert not statement.has_subject(DIGEST)


def test_statement_without_subject_is_refused() -> None:
    with pytest.raises(ValidationError):
        Statement(subject=(), predicate_type=VSA, predicate={})
