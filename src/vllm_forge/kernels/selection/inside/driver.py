"""A stub driver that declares GPUs. Standard library only.

vLLM refuses even --help on a host where it cannot tell the device (config/device.py), and its
extensions link libcuda. NVML answers with what was declared; every call of the driver proper
fails with CUDA_ERROR_NO_DEVICE.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# The facts are set when it is compiled (-D), or in the process that asks.
NVML = """
#include <string.h>
int forge_major = MAJOR, forge_minor = MINOR;
unsigned forge_count = COUNT; unsigned long long forge_memory = MEMORY;
char forge_name[96] = NAME;
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
CUDA_CALLS = (
    "cuGetProcAddress_v2", "cuPointerGetAttribute", "cuTensorMapEncodeTiled", "cuCtxGetCurrent",
    "cuCtxSetCurrent", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuGetErrorString",
    "cuMemAddressFree", "cuMemAddressReserve", "cuMemCreate", "cuMemGetAllocationGranularity",
    "cuMemMap", "cuMemRelease", "cuMemSetAccess", "cuMemUnmap", "cuInit", "cuDriverGetVersion",
)  # fmt: skip
CUDA = "".join(f"int {name}(void) {{ return 100; }}\n" for name in CUDA_CALLS)
NAME_BYTES = 96
NVML_NAME = "libnvidia-ml.so.1"
STUBS = {NVML_NAME: NVML, "libcuda.so.1": CUDA}


@dataclass(frozen=True, kw_only=True)
class Device:
    """Name, compute capability ("10.3"), bytes per GPU and number of GPUs."""

    name: str
    compute_capability: str
    memory_bytes: int
    count: int

    @property
    def capability(self) -> tuple[int, int]:
        """Major and minor."""
        major, _, minor = self.compute_capability.partition(".")
        return int(major), int(minor)


NO_DEVICE = Device(name="", compute_capability="0.0", memory_bytes=0, count=0)


def build_stubs(folder: Path, device: Device = NO_DEVICE) -> None:
    """Compile the stub driver, once for all processes; they see the device from their start."""
    major, minor = device.capability
    facts = {
        "MAJOR": major,
        "MINOR": minor,
        "COUNT": device.count,
        "MEMORY": f"{device.memory_bytes}ull",
        "NAME": f'"{device.name}"',
    }
    for name, code in STUBS.items():
        source = folder / f"{name}.c"
        source.write_text(code)
        subprocess.run(
            [
                "gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}",
                *(f"-D{fact}={value}" for fact, value in facts.items()),
                "-o", str(folder / name), str(source),
            ],
            check=True,
        )  # fmt: skip


def load_stubs(folder: Path) -> ctypes.CDLL:
    """Make this process, and those it starts, find the stub driver; returns its NVML."""
    # The loader takes a library of that name that is loaded already.
    loaded = {name: ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in STUBS}
    os.environ["LD_LIBRARY_PATH"] = str(folder)
    return loaded[NVML_NAME]
