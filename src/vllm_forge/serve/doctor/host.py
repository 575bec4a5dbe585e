"""The host as its tools describe it: asked through a probe, parsed into records."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vllm_forge.host import Probe, Reply, parse_json
from vllm_forge.host.gpus import DETAILED, Gpu, gpu_query, parse_gpus

NOT_INSTALLED = "not installed"
DF = ("df", "--block-size=1", "--output=target,size,avail")


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """A container engine that answers.

    Attributes:
        root: where it keeps images and volumes.
        nvidia: it can hand GPUs to containers.
    """

    name: str
    version: str
    root: str
    nvidia: bool


@dataclass(frozen=True, kw_only=True)
class Host:
    """The answers of the host's tools.

    Attributes:
        gpus: as nvidia-smi lists them; ``gpus_error`` is its output if it lists none.
        versions: driver and user space, as ``nvidia-smi --version`` says.
        toolkit: version of the NVIDIA container toolkit, None if it is not installed.
        engines: those that answer; ``engine_errors`` has the output of the others.
        disk_free: bytes below ``disk_path``, where the first engine keeps its images.
        ram, shm: bytes in total.
    """

    gpus: tuple[Gpu, ...]
    gpus_error: str
    versions: dict[str, str]
    toolkit: str | None
    engines: tuple[EngineInfo, ...]
    engine_errors: dict[str, str]
    disk_path: str
    disk_free: int | None
    ram: int | None
    shm: int | None


def ask_host(probe: Probe) -> Host:
    """Ask every question; none of them changes anything."""
    gpus, gpus_error = listed_gpus(probe.ask("nvidia-smi", gpu_query(DETAILED)))
    toolkit = _version(probe.ask("nvidia-ctk", ["nvidia-ctk", "--version"]))
    devices = probe.ask("nvidia-ctk-cdi", ["nvidia-ctk", "cdi", "list"]).text
    replies = {
        "docker": probe.ask("docker", ["docker", "info", "--format", "{{json .}}"]),
        "podman": probe.ask("podman", ["podman", "info", "--format", "json"]),
    }
    engines: list[EngineInfo] = []
    errors: dict[str, str] = {}
    for name, reply in replies.items():
        info = _json(reply)
        try:
            if info is not None:
                engines.append(_docker(info) if name == "docker" else _podman(info, devices))
                continue
        except (LookupError, TypeError, AttributeError) as error:
            errors[name] = f"unexpected answer: {error!r}"
        else:
            errors[name] = NOT_INSTALLED if reply.missing else _one_line(reply)
    path = engines[0].root if engines else "/"
    return Host(
        gpus=gpus,
        gpus_error=gpus_error,
        versions=parse_versions(probe.ask("nvidia-smi-version", ["nvidia-smi", "--version"])),
        toolkit=toolkit,
        engines=tuple(engines),
        engine_errors=errors,
        disk_path=path,
        disk_free=_df(probe.ask("df", [*DF, path]), -1),
        ram=parse_meminfo(probe.ask("meminfo", ["cat", "/proc/meminfo"])),
        shm=_df(probe.ask("df-shm", [*DF, "/dev/shm"]), -2),  # noqa: S108
    )


def listed_gpus(reply: Reply) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs; and nvidia-smi's output if it lists none."""
    if reply.missing:
        return (), "nvidia-smi is not installed"
    rows = "\n".join(line for line in reply.text.splitlines() if "," in line)  # no warnings
    try:
        gpus = () if reply.code else parse_gpus(rows, DETAILED)
    except ValueError:
        gpus = ()
    return gpus, "" if gpus else _one_line(reply)


def parse_versions(reply: Reply) -> dict[str, str]:
    """``{"NVIDIA-SMI": ..., "NVML": ..., "DRIVER": ...}``; empty if it does not answer."""
    pairs = re.findall(r"^(NVIDIA-SMI|NVML|DRIVER) version\s*:\s*(\S+)$", reply.text, re.M)
    return {} if reply.code else dict(pairs)


def parse_meminfo(reply: Reply) -> int | None:
    """Bytes of RAM; the file counts in KiB."""
    match = re.search(r"^MemTotal:\s+(\d+) kB$", reply.text, re.M)
    return None if match is None else int(match[1]) * 1024


def _docker(info: dict[str, Any]) -> EngineInfo:
    devices = [item.get("ID", "") for item in info.get("DiscoveredDevices") or []]
    nvidia = "nvidia" in (info.get("Runtimes") or {}) or any("nvidia.com/gpu" in d for d in devices)
    return EngineInfo(
        name="docker", version=info["ServerVersion"], root=info["DockerRootDir"], nvidia=nvidia
    )


def _podman(info: dict[str, Any], devices: str) -> EngineInfo:
    return EngineInfo(
        name="podman",
        version=info["version"]["Version"],
        root=info["store"]["graphRoot"],
        nvidia="nvidia.com/gpu=" in devices,
    )


def _json(reply: Reply) -> dict[str, Any] | None:
    try:
        info = None if reply.code else parse_json(reply.text)
    except ValueError:
        return None
    return info if isinstance(info, dict) else None


def _version(reply: Reply) -> str | None:
    match = re.search(r"version (\S+)", reply.text)
    return None if reply.code or match is None else match[1]


def _df(reply: Reply, column: int) -> int | None:
    """A number of df's row, counted from the right: a mount point may have spaces."""
    lines = reply.text.splitlines()
    try:
        _, row = lines
        return None if reply.code else int(row.split()[column])
    except (ValueError, IndexError):  # not a header and a row, or "-", or no such column
        return None


def _one_line(reply: Reply) -> str:
    """A tool's output in one line."""
    lines = [line.strip() for line in reply.text.splitlines() if line.strip()]
    return "; ".join(lines) if lines else f"exit {reply.code} without a word"
