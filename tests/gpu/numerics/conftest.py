"""The op under test, as the race tests have it; and the backends of NVFP4 experts."""

from __future__ import annotations

import pytest

from tests.gpu.numerics.selected import EXPERTS
from tests.gpu.race.conftest import op

__all__ = ["op"]
each_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            name,
            marks=[getattr(pytest.mark, marker) for marker, own in EXPERTS.items() if own == name],
        )
        for name in sorted(set(EXPERTS.values()))
    ],
)
