"""What all tests share: output without colours, and no time for what no test needs."""

from __future__ import annotations

import gc
import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

# As many workers as cores run the tests: more threads of numpy would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

for variable in ("FORCE_COLOR", "CLICOLOR_FORCE"):  # of a CI service, for logs that people read
    os.environ.pop(variable, None)

# Some tests send it, and what runs in the background of a script would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for garbage among the tests' own objects only: all that is collected is kept."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
