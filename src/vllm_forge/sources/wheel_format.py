"""What of the wheel format neither zipfile nor installer does: RECORD rows, raw members."""

import base64
import csv
import hashlib
import io
import zipfile
from collections.abc import Callable
from typing import BinaryIO

LOCAL_HEADER = 30  # bytes before the name, APPNOTE.TXT 4.3.7


def record_hash(digest: bytes) -> str:
    """A SHA-256 digest as RECORD has it: URL-safe base64 without padding, without ``sha256=``."""
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def record_row(content: bytes) -> tuple[str, str]:
    """Hash and size columns of RECORD for a file's content."""
    return f"sha256={record_hash(hashlib.sha256(content).digest())}", str(len(content))


def rewrite_record(record: bytes, change: Callable[[str, str, str], tuple[str, str, str]]) -> bytes:
    """RECORD with its columns path, hash and size changed; the same bytes where none changes."""
    old_rows = list(csv.reader(io.StringIO(record.decode())))
    new_rows = [list(change(*row)) for row in old_rows]
    if new_rows == old_rows:
        return record
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(new_rows)
    return out.getvalue().encode()


def seek_to_data(archive: BinaryIO, member: zipfile.ZipInfo) -> None:
    """Seek to a member's compressed bytes, behind its local header."""
    archive.seek(member.header_offset)
    header = archive.read(LOCAL_HEADER)
    name, extra = header[26:28], header[28:30]
    archive.seek(int.from_bytes(name, "little") + int.from_bytes(extra, "little"), 1)
