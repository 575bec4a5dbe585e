"""A ``torch`` with one GPU of an H200's size, for tier edges: written as ``torch.py`` by a test."""

from __future__ import annotations

import os
from types import SimpleNamespace

TOTAL = 143156 << 20
UNLIMITED = "FAKE_TORCH_UNLIMITED"  # a fault: the limit has no effect
uint8 = None


class OutOfMemoryError(RuntimeError):
    """As torch's; printed with the name of this module."""


def empty(size: int, **_: object) -> None:
    part = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "").rpartition("per_process_memory_fraction:")
    if size > float(part[2] or 1) * TOTAL and UNLIMITED not in os.environ:
        raise OutOfMemoryError("CUDA out of memory.")


cuda = SimpleNamespace(get_device_properties=lambda _: SimpleNamespace(total_memory=TOTAL))
