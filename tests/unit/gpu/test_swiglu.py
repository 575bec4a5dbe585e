"""SwiGLU with a clamp: the bound passes a right kernel and no kernel that lost the clamp."""

from __future__ import annotations

import numpy as np
import pytest

from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.marlin_reference import margin
from tests.gpu.reference.swiglu import activated, exceeds, swiglu

LIMIT = 10.0


def inputs() -> np.ndarray:
    rng = np.random.default_rng(2)
    return bfloat16((8 * rng.standard_normal((64, 512))).astype(np.float32))


def kernel(both: np.ndarray, limit: float | None) -> np.ndarray:
    gate, up = (half.astype(np.float32) for half in np.split(both, 2, axis=1))
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    silu = bfloat16(gate / (1 + np.exp(-gate)))
    return bfloat16((silu * up).astype(np.float32))


def test_a_right_kernel_is_within_the_bound() -> None:
    both = inputs()
    assert exceeds(both, LIMIT)
    assert 0.3 < margin(kernel(both, LIMIT), activated(both, LIMIT)) <= 1


@pytest.mark.parametrize("lost", ["all", "gate", "up", "one side of up", "other limit"])
def test_a_lost_clamp_is_noticed(lost: str) -> None:
    both = inputs()
    gate, up = np.split(both, 2, axis=1)
    broken = {
        "all": kernel(both, None),
        "gate": kernel(np.hstack([gate, np.clip(up, -LIMIT, LIMIT)]), None),
        "up": kernel(np.hstack([np.minimum(gate, LIMIT), up]), None),
        "one side of up": kernel(np.hstack([np.minimum(gate, LIMIT), np.minimum(up, LIMIT)]), None),
        "other limit": kernel(both, LIMIT * 1.05),
    }[lost]
    assert margin(broken, activated(both, LIMIT)) > 1


def test_silu_of_one() -> None:
    assert swiglu(np.array([[1.0, 2.0]]), None)[0, 0] == pytest.approx(2 * 0.7310585786)
    assert swiglu(np.array([[50.0, -50.0]]), 10.0)[0, 0] == pytest.approx(-100, rel=1e-4)


def test_inputs_within_the_limit_show_nothing() -> None:
    assert not exceeds(np.clip(inputs(), -LIMIT, LIMIT), LIMIT)
