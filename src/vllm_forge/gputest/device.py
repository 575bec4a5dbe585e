"""Which GPUs this host has, asked of the driver."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

from vllm_forge.gputest.errors import WrongGpuError

FIELDS = ("name", "uuid", "compute_cap", "driver_version", "memory.total")
TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as the driver calls it.
        uuid_sha256: SHA-256 of its UUID in hex: tells two GPUs apart, and names none.
        compute_capability: e.g. ``9.0``.
        driver: version of the kernel driver.
        memory_mib: 2^20 bytes.
    """

    name: str
    uuid_sha256: str
    compute_capability: str
    driver: str
    memory_mib: int

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def parse_gpus(text: str) -> list[Gpu]:
    """Rows of ``nvidia-smi --query-gpu=... --format=csv,noheader,nounits``.

    Raises:
        WrongGpuError: a row is not in that form.
    """
    gpus = []
    for row in filter(None, map(str.strip, text.splitlines())):
        parts = [part.strip() for part in row.split(",")]
        if len(parts) != len(FIELDS) or not parts[-1].isdigit():
            raise WrongGpuError(
                f"nvidia-smi says {row!r}, which is not {', '.join(FIELDS)}",
                remedy="run nvidia-smi by hand: a GPU may have failed",
            )
        name, uuid, capability, driver, memory = parts
        gpus.append(
            Gpu(
                name=name,
                uuid_sha256=hashlib.sha256(uuid.encode()).hexdigest(),
                compute_capability=capability,
                driver=driver,
                memory_mib=int(memory),
            )
        )
    return gpus


def ask_gpus() -> list[Gpu]:
    """The GPUs that the driver lists.

    Raises:
        WrongGpuError: there is no driver, or no GPU.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        raise WrongGpuError(
            "there is no nvidia-smi, so there is no GPU to test",
            remedy="run this on a host of the SKU; make a kit for a host without network: "
            "nox -s forge -- gpu kit --sku SKU --output DIR",
        )
    done = subprocess.run(
        [program, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    gpus = parse_gpus(done.stdout) if done.returncode == 0 else []
    if not gpus:
        raise WrongGpuError(
            f"nvidia-smi lists no GPU: {(done.stdout + done.stderr).strip()[:300]}",
            remedy="give the container its GPUs, or mend the driver",
        )
    return gpus


def require_sku(gpus: list[Gpu], sku: str, capability: str, device: str) -> None:
    """Refuse GPUs that are not of the SKU: its compute capability and its product name.

    The product name matters, as two products of one capability differ in SMs, memory and clocks:
    the driver's name must be that of the SKU's row, or start with it.

    Raises:
        WrongGpuError: they are of another one.
    """
    other = [
        gpu
        for gpu in gpus
        if gpu.compute_capability != capability or not gpu.name.startswith(device)
    ]
    if other:
        raise WrongGpuError(
            f"{sku} is {device} with compute capability {capability}; this host has "
            f"{other[0].name} with {other[0].compute_capability}",
            remedy="run on a host of the SKU: what one SKU passes says nothing of another",
        )
