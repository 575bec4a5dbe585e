"""A GPU that is only declared: by the stub driver, and in torch's answers about CUDA.

vLLM asks NVML (platforms/cuda.py) and, here and there, torch.cuda. Both get the facts of the
question. Any other call of the driver fails, and an attribute of torch's without a fact raises: an
answer must not depend on anything that was not declared.
"""

from __future__ import annotations

import ctypes
import importlib
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .driver import NAME_BYTES, Device, load_stubs

# FlashInfer's modules read it when they are imported. No selection asks for it; if one did, its
# answer would not depend on the SKU.
ANY_MULTIPROCESSORS = 128


def _properties(device: Device) -> SimpleNamespace:
    major, minor = device.capability
    return SimpleNamespace(
        name=device.name,
        major=major,
        minor=minor,
        total_memory=device.memory_bytes,
        multi_processor_count=ANY_MULTIPROCESSORS,
    )


# Functions of torch.cuda, and what they answer.
ANSWERS: dict[str, Callable[[Device], Any]] = {
    "device_count": lambda device: device.count,
    "current_device": lambda device: 0,
    "get_device_capability": lambda device: device.capability,
    "get_device_name": lambda device: device.name,
    "get_device_properties": _properties,
    "graph_pool_handle": lambda device: (0, 0),
}


class _Unused:
    """A stream or an event, which constructors create and never use."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass


class DeclaredDevice:
    """The stub driver in this process, and the device that ``declare`` sets.

    ``early_calls``: callers of torch.cuda before that. They would keep the answer for all devices.
    """

    def __init__(self, folder: Path) -> None:
        """Load the stubs. Call it before torch and vLLM are imported."""
        self.early_calls: list[str] = []
        self._nvml = load_stubs(folder)
        self._cuda: Any = importlib.import_module("torch").cuda
        self._cuda.is_available = lambda: True
        self._cuda.Stream = self._cuda.Event = _Unused
        for name in ANSWERS:
            setattr(self._cuda, name, self._too_early(name))

    def _too_early(self, name: str) -> Any:
        def ask(*_args: object, **_kwargs: object) -> None:
            caller = traceback.extract_stack(limit=2)[0]
            self.early_calls.append(f"{caller.filename}:{caller.lineno} asks {name}")
            raise RuntimeError(self.early_calls[-1])

        return ask

    def declare(self, device: Device) -> None:
        """Make this process see the device."""
        major, minor = device.capability
        facts: tuple[tuple[Any, str, Any], ...] = (
            (ctypes.c_int, "forge_major", major),
            (ctypes.c_int, "forge_minor", minor),
            (ctypes.c_uint, "forge_count", device.count),
            (ctypes.c_ulonglong, "forge_memory", device.memory_bytes),
            (ctypes.c_char * NAME_BYTES, "forge_name", device.name.encode()),
        )
        for kind, name, value in facts:
            kind.in_dll(self._nvml, name).value = value
        for name, answer in ANSWERS.items():
            value = answer(device)
            setattr(self._cuda, name, lambda *_args, _value=value, **_kwargs: _value)
