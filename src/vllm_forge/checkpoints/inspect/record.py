"""The manifest.json that `quantize` leaves beside a checkpoint: every tensor, with its SHA-256.

Names, dtypes and shapes are compared here. The digests need the data, which an inspection does
not read.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.inspect.findings import Effect, Finding, some

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_forge.checkpoints.inspect.profile import Profile

RECORD = "manifest.json"


def against_record(profile: Profile) -> Iterator[Finding]:
    """What changed since the tensors were written."""
    text = profile.seen.place.text(RECORD)
    if text is None or not profile.tensors:
        return
    try:
        rows: dict[str, Any] = json.loads(text)["tensors"]
        recorded = {
            name: (row["dtype"], tuple(row["shape"]), row["file"]) for name, row in rows.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield _changed(f"{RECORD} cannot be read", f"{type(error).__name__}: {error}")
        return
    found = {n: (e.dtype, e.shape, e.shard) for n, e in profile.tensors.items()}
    for names, title in (
        (sorted(recorded.keys() - found.keys()), "recorded tensors are missing"),
        (sorted(found.keys() - recorded.keys()), "tensors are not recorded"),
        (
            sorted(n for n in recorded.keys() & found.keys() if recorded[n] != found[n]),
            "dtype, shape or shard is not as recorded",
        ),
    ):
        if names:
            yield _changed(f"{title} in {RECORD}", some(names))


def _changed(title: str, what: str) -> Finding:
    return Finding(
        gate="record",
        title=title,
        effect=Effect.DEPARTS,
        what=what,
        remedy="the files were changed after they were made: make them again, or fetch them again",
    )
