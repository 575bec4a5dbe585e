"""The op under test, as the race tests have it."""

from __future__ import annotations

from tests.gpu.race.conftest import op

__all__ = ["op"]
