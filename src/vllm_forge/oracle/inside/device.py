"""A GPU that is only declared: a stub driver, and torch's questions to CUDA answered from it.

vLLM asks NVML (platforms/cuda.py) and, here and there, torch.cuda. Both get the facts of the
question. Whatever else is asked of the driver fails, and what torch has no fact for raises: an
answer must not depend on something that nobody declared.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NVML = """
#include <string.h>
int forge_major, forge_minor; unsigned forge_count; unsigned long long forge_memory;
char forge_name[96];
typedef struct { unsigned long long total, free, used; } memory;
int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount(unsigned *n) { *n = forge_count; return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = forge_count; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = (void *)(size_t)(i + 1); return 0; }
int nvmlDeviceGetCudaComputeCapability(void *h, int *a, int *b)
{ (void)h; *a = forge_major; *b = forge_minor; return 0; }
int nvmlDeviceGetName(void *h, char *s, unsigned n)
{ (void)h; strncpy(s, forge_name, n); return 0; }
int nvmlDeviceGetMemoryInfo(void *h, memory *m)
{ (void)h; m->total = m->free = forge_memory; m->used = 0; return 0; }
const char *nvmlErrorString(int code) { (void)code; return "declared device"; }
"""
# vLLM's extensions link libcuda; every call fails with CUDA_ERROR_NO_DEVICE.
CUDA_CALLS = (
    "cuGetProcAddress_v2", "cuPointerGetAttribute", "cuTensorMapEncodeTiled", "cuCtxGetCurrent",
    "cuCtxSetCurrent", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuGetErrorString",
    "cuMemAddressFree", "cuMemAddressReserve", "cuMemCreate", "cuMemGetAllocationGranularity",
    "cuMemMap", "cuMemRelease", "cuMemSetAccess", "cuMemUnmap", "cuInit", "cuDriverGetVersion",
)  # fmt: skip
CUDA = "".join(f"int {name}(void) {{ return 100; }}\n" for name in CUDA_CALLS)
# FlashInfer's modules read it when they are imported. No selection asks for it; if one did, its
# answer would not depend on the SKU.
ANY_MULTIPROCESSORS = 128
NAME_BYTES = 96
STUBS = {"libnvidia-ml.so.1": NVML, "libcuda.so.1": CUDA}


@dataclass(frozen=True, kw_only=True)
class Device:
    """As in the question: name, compute capability ("10.3"), bytes per GPU, GPUs."""

    name: str
    compute_capability: str
    memory_bytes: int
    count: int

    @property
    def capability(self) -> tuple[int, int]:
        """Major and minor."""
        major, _, minor = self.compute_capability.partition(".")
        return int(major), int(minor)


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


class _Nothing:
    """A stream, an event: made by constructors, never used by what we ask."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass


def build_stubs(folder: Path) -> None:
    """Compile the stub driver, once for all processes."""
    for name, code in STUBS.items():
        source = folder / f"{name}.c"
        source.write_text(code)
        subprocess.run(
            [
                "gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}",
                "-o", str(folder / name), str(source),
            ],
            check=True,
        )  # fmt: skip


class Declared:
    """The stub driver in this process; nothing is declared before ``declare`` was called.

    ``asked``: who asked torch before that. Such an answer would be kept for all devices.
    """

    def __init__(self, folder: Path) -> None:
        """Load the stubs; before torch and vLLM are imported."""
        self.asked: list[str] = []
        # The loader takes a library of that name that is loaded already.
        libraries = {
            name: ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in STUBS
        }
        os.environ["LD_LIBRARY_PATH"] = str(folder)
        self._nvml = libraries["libnvidia-ml.so.1"]
        self._cuda: Any = importlib.import_module("torch").cuda
        self._cuda.is_available = lambda: True
        self._cuda.Stream = self._cuda.Event = _Nothing
        for name in ANSWERS:
            setattr(self._cuda, name, self._too_early(name))

    def _too_early(self, name: str) -> Any:
        def ask(*_args: object, **_kwargs: object) -> None:
            caller = traceback.extract_stack(limit=2)[0]
            self.asked.append(f"{caller.filename}:{caller.lineno} asks {name}")
            raise RuntimeError(self.asked[-1])

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
