"""Whether a line copes with a known fault: what dispositions.toml decided about its remedy."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_forge.matrix.errors import MatrixValueError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DISPOSITIONS = "patches/vllm/dispositions.toml"
COPES = {"carried": "patched", "retired": "in the release", "not-applicable": "not concerned"}


@dataclass(frozen=True)
class Remedies:
    """Upstream change -> line -> status."""

    rows: Mapping[str, Mapping[str, str]]

    def status(self, about: str, line: str) -> str:
        """``carried``, ``retired``, ``refused`` or ``not-applicable``.

        Raises:
            MatrixValueError: nothing was decided about it.
        """
        decided = self.rows.get(about, {})
        status = decided.get(line, decided.get("all"))
        if status is None:
            raise MatrixValueError(
                f"nothing is decided about {about} on line {line}", where=DISPOSITIONS
            )
        return status


def read_remedies(root: Path) -> Remedies:
    """From the checkout."""
    data: dict[str, Any] = tomllib.loads((root / DISPOSITIONS).read_text(encoding="utf-8"))
    return Remedies(
        {
            row["about"]: {line: decision["status"] for line, decision in row["on"].items()}
            for row in data["disposition"]
        }
    )
