"""The GPUs of this host, as nvidia-smi lists them."""

from __future__ import annotations

import hashlib
import os
import subprocess
from typing import Any

from tests.gpu.harness.errors import WrongGpuError

FIELDS = ("name", "uuid", "compute_cap", "driver_version", "memory.total")
TIMEOUT_S = 60
NAMED = "CUDA_VISIBLE_DEVICES"
VISIBLE = "VLLM_FORGE_GPU_VISIBLE"  # of the whole run; an xdist worker has one of them for itself
RANKS = "VLLM_FORGE_GPU_RANKS"  # how many GPUs the tier is for, by its row of suite.toml
# All-reduces through NVLink multicast, which the operators of shared hosts forbid, have no variable
# that a host sets. vLLM's fused one is off in the arguments of servers.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}


def query(*fields: str, gpu: str = "") -> list[list[str]]:
    """These fields of every GPU, or of the one with this index or UUID.

    Raises:
        OSError: no nvidia-smi.
        subprocess.SubprocessError: it failed.
        ValueError: a row is not of these fields.
    """
    argv = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    text = subprocess.run(
        [*argv, "-i", gpu] if gpu else argv,
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    ).stdout
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line]
    for row in rows:
        if len(row) != len(fields):
            raise ValueError(f"expected {', '.join(fields)}, got {', '.join(row)}")
    return rows


def visible() -> list[str]:
    """Indexes or UUIDs of the run's GPUs, found without touching CUDA."""
    if (names := os.environ.get(VISIBLE, os.environ.get(NAMED))) is not None:
        return [name for name in names.split(",") if name]
    try:
        return [index for (index,) in query("index")]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def ranks() -> int:
    """GPUs that the tier is for."""
    return int(os.environ.get(RANKS, "1"))


def parallel_variables() -> dict[str, str]:
    """Environment of a process that uses all GPUs of its tier."""
    return {NAMED: ",".join(visible()[: ranks()]), **NO_MULTICAST}


def list_gpus() -> list[dict[str, Any]]:
    """What a receipt has of each GPU: those that CUDA_VISIBLE_DEVICES names, or all.

    Memory is in MiB; UUIDs are hashed.

    Raises:
        WrongGpuError: no driver, no GPU, or one that failed.
    """
    names = os.environ.get(NAMED)
    named = None if names is None else tuple(filter(None, names.split(",")))
    try:
        gpus = [
            {
                "name": name,
                "uuid_sha256": hashlib.sha256(uuid.encode()).hexdigest(),
                "compute_capability": capability,
                "driver": driver,
                "memory_mib": int(memory),
            }
            for index, (name, uuid, capability, driver, memory) in enumerate(query(*FIELDS))
            if named is None or str(index) in named or uuid.startswith(named)
        ]
        reason = f"it lists no GPU of {NAMED}={names}" if names is not None else "it lists no GPU"
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        gpus, reason = [], f"{type(error).__name__}: {error}"
    if not gpus:
        raise WrongGpuError(
            f"no GPU to test: {reason}",
            where="nvidia-smi",
            remedy="run this on a host of the SKU, and give a container its GPUs; a kit is for a "
            "host without network: nox -s forge -- gpu kit --sku SKU --output DIR",
        )
    return gpus


def require_sku(gpus: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    """Refuse GPUs that are not of the plan's SKU: its compute capability and its product name.

    Raises:
        WrongGpuError: one is not.
    """
    for gpu in gpus:
        capability, name = gpu["compute_capability"], gpu["name"]
        if capability != plan["compute_capability"] or not name.startswith(plan["device"]):
            raise WrongGpuError(
                f"{plan['sku']} is {plan['device']} with compute capability "
                f"{plan['compute_capability']}; this host has {name} with {capability}",
                remedy="run on a host of the SKU",
            )
