"""Judgements about engine, disk and memory; each red line has its remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_forge.host import gigabytes
from vllm_forge.serve.doctor.finding import Finding, Wanted, at_least

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_forge.serve.doctor.host import Host


def check_engine(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """An engine that hands GPUs to containers: one is enough."""
    del wanted
    able = any(engine.nvidia for engine in host.engines)
    needed = "docker or podman, with the NVIDIA container toolkit"
    for engine in host.engines:
        seen = f"{engine.name} {engine.version}"
        if engine.nvidia:
            yield Finding(check="container engine", level="ok", seen=seen, needed=needed)
        else:
            yield Finding(
                check="container engine",
                level="unknown" if able else "red",
                seen=f"{seen}, which does not know the GPUs",
                needed=needed,
                remedy=_configure(engine.name),
            )
    for name, words in host.engines_said.items():
        if host.engines or words == "not installed":
            continue
        yield Finding(
            check="container engine",
            level="red",
            seen=f"{name}: {words}",
            needed=needed,
            remedy=f"start {name}, or use an account that may talk to it",
        )
    if set(host.engines_said.values()) == {"not installed"} and not host.engines:
        yield Finding(
            check="container engine",
            level="red",
            seen="neither docker nor podman is installed",
            needed=needed,
            remedy="install one of them and nvidia-container-toolkit",
        )
    if host.toolkit is None:
        yield Finding(
            check="container toolkit",
            level="unknown" if able else "red",
            seen="nvidia-ctk is not installed",
            needed=needed,
            remedy="install nvidia-container-toolkit from NVIDIA's package repository",
        )
    else:
        yield Finding(check="container toolkit", level="ok", seen=host.toolkit, needed=needed)


def check_disk(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """Room for the image and, in the volume beside it, the weights."""
    needs = wanted.needs
    known = needs.disk_bytes is not None
    need = needs.image_bytes if needs.disk_bytes is None else needs.disk_bytes
    what = "image and weights" if known else "the image alone; the weights' size is unknown"
    remedy = "free some, or move the engine's data folder to a larger disk"
    yield from at_least(
        "disk", host.disk_free, need, f"for {what}", remedy, place=f" free below {host.disk_path}"
    )


def check_ram(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """RAM for the shard file that the workers map; then for all of them as page cache."""
    needs = wanted.needs
    if needs.ram_bytes is None or needs.page_cache_bytes is None:
        yield Finding(
            check="RAM",
            level="unknown",
            seen="not read" if host.ram is None else gigabytes(host.ram),
            needed=f"unknown: matrix.toml has no size of {wanted.item.artifact_name}",
        )
        return
    remedy = "use a host with more RAM: pages of a shard file are read again when they do not fit"
    yield from at_least("RAM", host.ram, needs.ram_bytes, "for a shard file", remedy)
    if host.ram is not None and needs.ram_bytes <= host.ram < needs.page_cache_bytes:
        yield Finding(
            check="page cache",
            level="unknown",
            seen=gigabytes(host.ram),
            needed=f"{gigabytes(needs.page_cache_bytes)} to read the weights from disk only once",
            remedy="none needed: each worker reads all files, so the start takes longer",
        )


def check_shm(host: Host, wanted: Wanted) -> Iterator[Finding]:
    """The host's /dev/shm, which a server outside a container uses; a container has its own."""
    need = wanted.needs.shm_bytes
    remedy = f"mount -o remount,size={need >> 30}g /dev/shm; or serve in the container"
    purpose = "for a server outside a container"
    for finding in at_least("/dev/shm", host.shm, need, purpose, remedy):  # noqa: S108
        able = any(engine.nvidia for engine in host.engines)
        yield replace(finding, level="unknown") if finding.level == "red" and able else finding


def _configure(engine: str) -> str:
    match engine:
        case "docker":
            return "nvidia-ctk runtime configure --runtime=docker && systemctl restart docker"
        case _:
            return "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
