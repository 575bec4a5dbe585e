"""Judgements about GPUs, driver and fabric; each red line has its remedy."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from vllm_forge.host import gigabytes
from vllm_forge.serve.doctor.finding import Finding, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_forge.host.gpus import Gpu
    from vllm_forge.matrix import Matrix
    from vllm_forge.serve.doctor.host import Host


def check_gpus(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """Is there a GPU, of the compute capability that the image is for, and enough of them?"""
    sku, count = wanted.item.cell.sku, wanted.needs.gpus
    needed = f"{count} of compute capability {sku.compute_capability} ({sku.device})"
    if not host.gpus:
        yield Finding(
            check="GPU",
            level="red",
            seen=f"none: {host.gpus_said}",
            needed=needed,
            remedy=(
                f"install the NVIDIA driver, at least {wanted.needs.driver}; if it is installed, "
                "`nvidia-smi` and `dmesg | grep -i nvrm` say what it lacks"
            ),
        )
        return
    fitting = [gpu for gpu in host.gpus if gpu.capability == sku.compute_capability]
    kinds = Counter(f"{gpu.name} ({gpu.capability})" for gpu in host.gpus)
    seen = ", ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items()))
    if not fitting:
        yield Finding(
            check="compute capability",
            level="red",
            seen=seen,
            needed=f"{sku.compute_capability}: the image's kernels are compiled for {sku.arch}",
            remedy=_other_sku(host.gpus, wanted.matrix),
        )
        return
    yield Finding(check="compute capability", level="ok", seen=seen, needed=sku.compute_capability)
    if strange := sorted({gpu.name for gpu in fitting} - {sku.device}):
        yield Finding(
            check="device",
            level="unknown",
            seen=", ".join(strange),
            needed=sku.device,
            remedy="same compute capability, another product: nothing was run on it",
        )
    enough = len(fitting) >= count
    yield Finding(
        check="GPU count",
        level="ok" if enough else "red",
        seen=str(len(fitting)),
        needed=f"{count}: preset {wanted.item.short_name} has --tensor-parallel-size={count}",
        remedy="" if enough else _smaller_preset(len(fitting), wanted),
    )


def check_split(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """MIG slices have neither the memory nor the NVLink that a preset counts on."""
    del wanted
    if split := [str(gpu.index) for gpu in host.gpus if gpu.mig]:
        yield Finding(
            check="MIG",
            level="red",
            seen=f"on, GPU {', '.join(split)}",
            needed="off",
            remedy="nvidia-smi -mig 0, as root, with no process on the GPUs",
        )


def check_memory(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """Do a GPU's part of the weights fit?"""
    sku = wanted.item.cell.sku
    sizes = [gpu.memory for gpu in host.gpus if gpu.capability == sku.compute_capability]
    if not sizes:
        return
    seen = f"{gigabytes(min(sizes))} per GPU"
    part = wanted.needs.weights_per_gpu_bytes
    if part is None:
        yield Finding(
            check="GPU memory",
            level="unknown",
            seen=seen,
            needed=f"unknown: matrix.toml has no size of {wanted.item.artifact_name}",
        )
        return
    fits = min(sizes) > part
    yield Finding(
        check="GPU memory",
        level="ok" if fits else "red",
        seen=seen,
        needed=f"{gigabytes(part)} for the weights; KV cache and graphs on top",
        remedy="" if fits else "use a preset with more GPUs, or a smaller artifact",
    )


def check_driver(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """Every GPU's driver against the floor of the line's CUDA."""
    line, floor = wanted.item.cell.line, wanted.needs.driver
    needed = f"at least {floor}: CUDA {line.cuda} ({wanted.matrix.cuda[line.cuda].source})"
    for driver in sorted({gpu.driver for gpu in host.gpus}):
        try:
            good = Version(driver) >= Version(floor)
        except InvalidVersion:
            yield Finding(check="driver", level="unknown", seen=driver, needed=needed)
            continue
        yield Finding(
            check="driver",
            level="ok" if good else "red",
            seen=driver,
            needed=needed,
            remedy=""
            if good
            else f"install a driver of branch {floor.partition('.')[0]} or later, reboot",
        )


def check_mixed_drivers(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """Kernel module, nvidia-smi and NVML of one release: a mix fails or is slow."""
    del wanted
    remedy = "install one driver release for module and libraries, reboot (or reload the module)"
    if "mismatch" in host.gpus_said:
        yield Finding(
            check="mixed drivers",
            level="red",
            seen=host.gpus_said,
            needed="one release",
            remedy=remedy,
        )
        return
    found = {gpu.driver for gpu in host.gpus} | set(host.versions.values())
    if not host.gpus or not host.versions:
        return
    # NVML says major.minor only: 580.95 for 580.95.05.
    longest = max(found, key=len)
    mixed = [item for item in found if item != longest and not longest.startswith(f"{item}.")]
    yield Finding(
        check="mixed drivers",
        level="red" if mixed else "ok",
        seen=", ".join(f"{name} {value}" for name, value in sorted(host.versions.items())),
        needed="one release",
        remedy=remedy if mixed else "",
    )


def check_fabric(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """GPUs behind NVSwitch need the fabric manager; without it CUDA fails with error 802."""
    del wanted
    states = {gpu.fabric for gpu in host.gpus if gpu.fabric is not None}
    if not states:
        return
    bad = states - {"ready"}
    yield Finding(
        check="NVLink fabric",
        level="red" if bad else "ok",
        seen=", ".join(sorted(states)),
        needed="ready",
        remedy="start nvidia-fabricmanager, of the driver's own release" if bad else "",
    )


def _other_sku(gpus: tuple[Gpu, ...], matrix: Matrix) -> str:
    found = {gpu.capability for gpu in gpus}
    names = [name for name, row in matrix.sku.items() if row.compute_capability in found]
    if names:
        return "ask for " + " or ".join(f"--sku {name}" for name in names)
    return "no image of this project is for these GPUs; SKUs: " + ", ".join(matrix.sku)


def _smaller_preset(count: int, wanted: Wanted) -> str:
    item = wanted.item
    names = [
        name.removeprefix(f"{item.cell.sku_name}-")
        for name, row in wanted.matrix.preset.items()
        if row.sku == item.cell.sku_name and row.tensor_parallel <= count
    ]
    if names:
        return "choose a preset for fewer GPUs: " + ", ".join(f"--preset {name}" for name in names)
    return "use a host with more GPUs: no preset of this SKU is for fewer"
