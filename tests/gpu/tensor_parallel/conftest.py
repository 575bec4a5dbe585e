"""The ranks' sums, which tests read."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.gpu.conftest import TOGETHER, why_not
from tests.gpu.tensor_parallel import shards

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

SECONDS = 60  # of imports, mostly


def pytest_collection_finish(session: pytest.Session) -> None:
    together = session.config.stash[TOGETHER]
    for item in session.items:
        if isinstance(item, pytest.Function) and "sums" in item.fixturenames and not why_not(item):
            backend = str(item.callspec.params["backend"])
            call = partial(shards.run, backend, together.work)
            together.add(f"shards-{backend}", SECONDS, call, "shards")


@pytest.fixture
def sums(pytestconfig: pytest.Config) -> Callable[[str], dict[str, NDArray[np.float64]]]:
    """What all ranks gave together, by cell and fault; ``whole``: by one rank alone."""
    together = pytestconfig.stash[TOGETHER]
    return lambda backend: dict(together.result(f"shards-{backend}"))
