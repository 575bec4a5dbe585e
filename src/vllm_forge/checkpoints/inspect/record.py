"""The manifest.json that `quantize` leaves beside a checkpoint: every tensor, with its SHA-256.

Names, dtypes and shapes are always compared. The digests need all of the data, so they are
compared where that is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.inspect.findings import Finding, finding, summarize
from vllm_forge.checkpoints.tensors import strict_json
from vllm_forge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_forge.checkpoints.inspect.profile import Profile

RECORD = "manifest.json"


def against_record(profile: Profile, *, digests: bool = False) -> Iterator[Finding]:
    """What changed since the tensors were written.

    Args:
        profile: the checkpoint.
        digests: read all tensors and compare their SHA-256 too.

    Raises:
        UsageError: digests are wanted and there is no record of them.
    """
    text = profile.checkpoint.source.text(RECORD)
    if text is None or not profile.tensors:
        if digests:
            raise UsageError(
                f"--digests compares the tensors with {RECORD}, which is not here",
                where=str(profile.checkpoint.source),
                remedy="leave it out, or compare with the model: --source PLACE --values 0",
            )
        return
    try:
        rows: dict[str, Any] = strict_json(text)["tensors"]
        recorded = {
            name: (row["dtype"], tuple(row["shape"]), row["file"]) for name, row in rows.items()
        }
        sums = {name: str(row["sha256"]) for name, row in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield _changed(f"{RECORD} cannot be read", f"{type(error).__name__}: {error}")
        return
    found = {n: (e.dtype, e.shape, e.shard) for n, e in profile.tensors.items()}
    both = sorted(recorded.keys() & found.keys())
    for names, title in (
        (sorted(recorded.keys() - found.keys()), "recorded tensors are missing"),
        (sorted(found.keys() - recorded.keys()), "tensors are not recorded"),
        ([n for n in both if recorded[n] != found[n]], "dtype, shape or shard is not as recorded"),
        (
            [n for n in both if digests and profile.tensors[n].sha256() != sums[n]],
            "bytes are not as said",
        ),
    ):
        if names:
            yield _changed(f"{title} in {RECORD}", summarize(names))


def _changed(title: str, what: str) -> Finding:
    return finding("record", what, title=title)
