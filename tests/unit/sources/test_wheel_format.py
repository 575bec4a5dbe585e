"""RECORD rows are rewritten without touching the others."""

from __future__ import annotations

from vllm_forge.sources.wheel_format import record_row, rewrite_record


def test_changed_row_is_replaced_and_others_stay() -> None:
    old = b'a.so,sha256=AA,3\n"b,c.py",sha256=BB,4\n'
    new = rewrite_record(old, lambda path, *row: (path, *({"a.so": ("x", "1")}.get(path, row))))
    assert new == b'a.so,x,1\n"b,c.py",sha256=BB,4\n'


def test_record_without_changes_stays_byte_for_byte() -> None:
    old = b"a.so,sha256=AA,3\r\nRECORD,,\r\n"
    assert rewrite_record(old, lambda *row: row) == old


def test_row_is_that_of_pypa_wheel() -> None:
    assert record_row(b"") == ("sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU", "0")
