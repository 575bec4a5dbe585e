"""One line of the report, and what a host is judged against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vllm_forge.host import gigabytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_forge.matrix import Matrix
    from vllm_forge.serve import Serving
    from vllm_forge.serve.needs import Needs

Level = Literal["ok", "unknown", "red"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at.
        level: ``unknown`` is what cannot be judged, and does not fail.
        seen: what is there.
        needed: what is wanted.
        remedy: what to do; empty where nothing is to be done.
    """

    check: str
    level: Level
    seen: str
    needed: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the host is judged against."""

    matrix: Matrix
    item: Serving
    needs: Needs


def at_least(
    check: str, seen: int | None, need: int, purpose: str, remedy: str, *, place: str = ""
) -> Iterator[Finding]:
    """Is ``seen`` at least ``need`` bytes? What cannot be read is red."""
    if seen is None:
        yield Finding(
            check=check,
            level="red",
            seen=f"cannot be read{place}",
            needed=f"{gigabytes(need)} {purpose}",
            remedy="run where df and /proc are readable",
        )
        return
    yield Finding(
        check=check,
        level="ok" if seen >= need else "red",
        seen=f"{gigabytes(seen)}{place}",
        needed=f"{gigabytes(need)} {purpose}",
        remedy="" if seen >= need else remedy,
    )
