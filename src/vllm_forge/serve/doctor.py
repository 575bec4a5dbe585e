"""Doctor: what the host's tools say, and checks of it against a deployment."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from packaging.version import Version
from rich.text import Text

from vllm_forge.host import Probe, Reply, gigabytes, parse_json, printable
from vllm_forge.host.probe import GPU_QUERY, Gpu, parse_gpus
from vllm_forge.matrix import gpus_of
from vllm_forge.serve import machine
from vllm_forge.serve.deployment import Deployment, Needs, presets_of
from vllm_forge.serve.machine import HostFinding, Level, judged, one_line

NOT_INSTALLED = "not installed"
# What docker 28 prints before the reason, where no daemon answers: what its client knows.
CLIENT = re.compile(r"\A\{.*\}\n")
USED_QUERY = ("nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits")
DF = ("df", "--block-size=1", "--output=target,size,avail")


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """A container engine that answers; ``root`` is its data folder; ``nvidia``: it has GPUs."""

    name: str
    version: str
    root: str
    nvidia: bool
    cgroups: str = ""  # docker's cgroup driver
    discovers: bool = False  # docker lists CDI devices


@dataclass(frozen=True, kw_only=True)
class Host:
    """The answers of the host's tools; sizes in bytes."""

    gpus: tuple[Gpu, ...]
    gpus_error: str  # nvidia-smi's output if it lists none
    versions: dict[str, str]  # of driver and user space, as nvidia-smi --version says
    toolkit: str | None  # version of the NVIDIA container toolkit, None if it is not installed
    engines: tuple[EngineInfo, ...]  # those that answer
    engine_errors: dict[str, str]  # output of the others
    disk_path: str  # where the first engine keeps its images
    disk_free: int | None
    ram: int | None  # in total
    shm: int | None  # in total
    machine: Mapping[str, Reply]  # by question, see machine.QUESTIONS
    used: dict[int, int]  # GPU's index -> bytes in use, where nvidia-smi knows


def ask_host(probe: Probe) -> Host:
    """Ask every question; none of them changes anything."""
    gpus, gpus_error = listed_gpus(probe.ask("nvidia-smi", GPU_QUERY))
    toolkit = probe.ask("nvidia-ctk", ["nvidia-ctk", "--version"])
    version = None if toolkit.code else re.search(r"version (\S+)", toolkit.text)
    devices = probe.ask("nvidia-ctk-cdi", ["nvidia-ctk", "cdi", "list"]).text
    replies = {
        "docker": probe.ask("docker", ["docker", "info", "--format", "{{json .}}"]),
        "podman": probe.ask("podman", ["podman", "info", "--format", "json"]),
    }
    engines: list[EngineInfo] = []
    errors: dict[str, str] = {}
    for name, reply in replies.items():
        try:
            info = None if reply.code else parse_json(reply.text)
        except ValueError:
            info = None
        if not isinstance(info, dict):
            reason = replace(reply, text=CLIENT.sub("", reply.text))
            errors[name] = NOT_INSTALLED if reply.missing else one_line(reason)
            continue
        try:
            engines.append(_engine(name, info, devices))
        except (LookupError, TypeError, AttributeError) as error:
            errors[name] = f"unexpected answer: {error!r}"
    path = engines[0].root if engines else "/"
    return Host(
        gpus=gpus,
        gpus_error=gpus_error,
        versions=parse_versions(probe.ask("nvidia-smi-version", ["nvidia-smi", "--version"])),
        toolkit=version and version[1],
        engines=tuple(engines),
        engine_errors=errors,
        disk_path=path,
        disk_free=_df(probe.ask("df", [*DF, path]), -1),
        ram=parse_meminfo(probe.ask("meminfo", ["cat", "/proc/meminfo"])),
        shm=_df(probe.ask("df-shm", [*DF, "/dev/shm"]), -2),  # noqa: S108
        machine=machine.ask_machine(probe),
        used=parse_used(probe.ask("nvidia-smi-used", USED_QUERY)),
    )


def listed_gpus(reply: Reply) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs; and what nvidia-smi says of lost ones, or all of its output if it lists none."""
    if reply.missing:
        return (), "nvidia-smi is not installed"
    lines = reply.text.splitlines()
    rows = "\n".join(line for line in lines if "," in line)  # no warnings
    try:
        gpus = () if reply.code else parse_gpus(rows)
    except ValueError:
        gpus = ()
    lost = "; ".join(line.strip() for line in lines if machine.LOST.search(line))
    return gpus, lost if gpus else one_line(reply)


def parse_versions(reply: Reply) -> dict[str, str]:
    """``{"NVIDIA-SMI": ..., "NVML": ..., "DRIVER": ...}``; empty if it does not answer."""
    pairs = re.findall(r"^(NVIDIA-SMI|NVML|DRIVER) version\s*:\s*(\S+)$", reply.text, re.M)
    return {} if reply.code else dict(pairs)


def parse_used(reply: Reply) -> dict[int, int]:
    """Bytes in use by GPU, without rows that have an error instead."""
    rows = re.findall(r"^(\d{1,4}), (\d{1,9})$", reply.text, re.M)
    return {} if reply.code else {int(index): int(mib) << 20 for index, mib in rows}


def parse_meminfo(reply: Reply) -> int | None:
    """Bytes of RAM; the file counts in KiB."""
    match = re.search(r"^MemTotal:\s+([0-9]{1,15}) kB$", reply.text, re.M)
    return None if match is None else int(match[1]) * 1024


def _engine(name: str, info: dict[str, Any], devices: str) -> EngineInfo:
    if name == "podman":
        version, root = info["version"]["Version"], info["store"]["graphRoot"]
        nvidia, discovers = "nvidia.com/gpu=" in devices, True
    else:
        version, root = info["ServerVersion"], info["DockerRootDir"]
        ids = [item.get("ID", "") for item in info.get("DiscoveredDevices") or []]
        discovers = any("nvidia.com/gpu" in device for device in ids)
        nvidia = discovers or "nvidia" in (info.get("Runtimes") or {})
    if not (isinstance(root, str) and root.startswith("/") and isinstance(version, str)):
        raise TypeError(f"version {version!r}, data folder {root!r}")
    return EngineInfo(
        name=name, version=version, root=root, nvidia=nvidia, discovers=discovers,
        cgroups=str(info.get("CgroupDriver")),
    )  # fmt: skip


def _df(reply: Reply, column: int) -> int | None:
    """A number of df's row, counted from the right: a mount point may have spaces."""
    lines = reply.text.splitlines()
    try:
        _, row = lines
        return None if reply.code else int(row.split()[column])
    except (ValueError, IndexError):  # not a header and a row, or "-", or no such column
        return None


# --- checks ---

# Engine -> the command that lets it give GPUs to containers.
CONFIGURE = {
    "docker": "nvidia-ctk runtime configure --runtime=docker && systemctl restart docker",
    "podman": "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml",
}


def _at_least(check: str, size: int | None, need: int, purpose: str, remedy: str) -> HostFinding:
    """Whether a size is at least ``need`` bytes; red if it cannot be read."""
    needed = f"{gigabytes(need)} {purpose}"
    if size is None:
        return judged(check, False, "cannot be read", needed, "run where df and /proc are readable")
    return judged(check, size >= need, gigabytes(size), needed, remedy)


def check_gpus(host: Host, deployment: Deployment, needs: Needs) -> Iterator[HostFinding]:
    """GPUs of the image's compute capability, and enough of them."""
    cell, count = deployment.cell, needs.gpus
    sku, matrix = cell.sku, deployment.matrix
    if not host.gpus:
        needed = f"{count} of compute capability {sku.compute_capability} ({sku.device})"
        remedy = f"install the NVIDIA driver, at least {needs.driver}; if it is installed, "
        remedy += "`nvidia-smi` and `dmesg | grep -i nvrm` say what it lacks"
        yield judged("GPU", False, f"none: {host.gpus_error}", needed, remedy)
        return
    fitting = fitting_gpus(host.gpus, deployment)
    kinds = Counter(f"{gpu.name} ({gpu.capability})" for gpu in host.gpus)
    seen = ", ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items()))
    if not fitting:
        needed = f"{sku.compute_capability}: the image's kernels are compiled for {sku.arch}"
        present = {gpu.capability for gpu in host.gpus}
        names = [name for name, row in matrix.sku.items() if row.compute_capability in present]
        remedy = "ask for " + " or ".join(f"--sku {name}" for name in names)
        if not names:
            remedy = "no image of this project is for these GPUs; SKUs: " + ", ".join(matrix.sku)
        yield judged("compute capability", False, seen, needed, remedy)
        return
    yield judged("compute capability", True, seen, sku.compute_capability)
    if others := sorted({gpu.name for gpu in fitting} - {sku.device}):
        remedy = "same compute capability, another product: nothing was run on it"
        yield HostFinding("device", "unknown", ", ".join(others), sku.device, remedy)
    presets = presets_of(matrix, cell.sku_name)
    short = deployment.preset_name.removeprefix(f"{cell.sku_name}-")
    smaller = [short for short, name in presets.items() if gpus_of(matrix, name) <= len(fitting)]
    remedy = "choose a preset for fewer GPUs: " + ", ".join(f"--preset {name}" for name in smaller)
    if not smaller:
        remedy = "use a host with more GPUs: no preset of this SKU is for fewer"
    needed = f"{count}: preset {short} has {deployment.spread.text}"
    yield judged("GPU count", len(fitting) >= count, str(len(fitting)), needed, remedy)


def fitting_gpus(gpus: Iterable[Gpu], deployment: Deployment) -> list[Gpu]:
    """The GPUs that the image has kernels for."""
    capability = deployment.cell.sku.compute_capability
    return [gpu for gpu in gpus if gpu.capability == capability]


def whole_gpus(gpus: Iterable[Gpu], deployment: Deployment) -> list[Gpu]:
    """Those of them that serve can use: MIG slices lack the memory and NVLink of a preset."""
    return [gpu for gpu in fitting_gpus(gpus, deployment) if not gpu.mig]


def check_split(host: Host, deployment: Deployment, needs: Needs) -> Iterator[HostFinding]:
    """GPUs that are not split into MIG slices: as many as the preset has."""
    if split := [str(gpu.index) for gpu in host.gpus if gpu.mig]:
        remedy = "nvidia-smi -mig 0, as root, with no process on the GPUs"
        enough = len(whole_gpus(host.gpus, deployment)) >= needs.gpus
        needed = f"off, for {needs.gpus} GPUs"
        yield judged("MIG", enough, f"on, GPU {', '.join(split)}", needed, remedy)


def check_memory(host: Host, deployment: Deployment, needs: Needs) -> Iterator[HostFinding]:
    """Memory of a GPU for weights and KV cache, and what others use of it already."""
    fitting = fitting_gpus(host.gpus, deployment)
    sizes = {gpu.index: gpu.memory for gpu in fitting if gpu.memory is not None}
    if len(sizes) < len(fitting):
        seen = f"not given by the driver for {len(fitting) - len(sizes)} of {len(fitting)} GPUs"
        yield HostFinding("GPU memory", "unknown", seen, "a number per GPU")
    if not sizes:
        return
    smallest = min(sizes.values())
    if needs.memory is None:
        seen, needed = f"{gigabytes(smallest)} per GPU", _unknown_size(deployment)
        yield HostFinding("GPU memory", "unknown", seen, needed)
        return
    memory = replace(needs.memory, total=smallest)
    yield HostFinding("GPU memory", memory.verdict, memory.seen, memory.needed, memory.remedy)
    part = memory.utilization
    full = [index for index, size in sizes.items() if host.used.get(index, 0) > size * (1 - part)]
    if full and len(sizes) - len(full) < needs.gpus:
        seen = ", ".join(f"GPU {index} {gigabytes(host.used[index])}" for index in full)
        needed = f"less than {1 - part:.2f} of it: vLLM takes {part:g} (--gpu-memory-utilization)"
        remedy = "end what uses them (nvidia-smi lists processes), or lower the utilization"
        yield judged("GPU memory in use", False, seen, needed, remedy)


def _unknown_size(deployment: Deployment) -> str:
    return f"unknown: matrix.toml has no size of {deployment.artifact_name}"


def check_driver(host: Host, deployment: Deployment, needs: Needs) -> Iterator[HostFinding]:
    """Every GPU's driver against the oldest one for the line's CUDA."""
    cuda, floor = deployment.cell.line.cuda, needs.driver
    needed = f"at least {floor}: CUDA {cuda} ({deployment.matrix.cuda[cuda].source})"
    remedy = f"install a driver of branch {floor.partition('.')[0]} or later, reboot"
    for driver in sorted({gpu.driver for gpu in host.gpus}):
        try:
            yield judged("driver", Version(driver) >= Version(floor), driver, needed, remedy)
        except ValueError:  # not a version, or one of too many digits
            yield HostFinding("driver", "unknown", driver, needed)


def check_mixed_drivers(host: Host, *_: object) -> Iterator[HostFinding]:
    """Kernel module, nvidia-smi and NVML of one release: a mix fails or is slow."""
    remedy = "install one driver release for module and libraries, reboot (or reload the module)"
    if "mismatch" in host.gpus_error:
        yield judged("mixed drivers", False, host.gpus_error, "one release", remedy)
    elif host.gpus and host.versions:
        versions = {gpu.driver for gpu in host.gpus} | set(host.versions.values())
        # NVML says major.minor only: 580.95 for 580.95.05.
        longest = max(versions, key=len)
        mixed = any(v != longest and not longest.startswith(f"{v}.") for v in versions)
        seen = ", ".join(f"{name} {value}" for name, value in sorted(host.versions.items()))
        yield judged("mixed drivers", not mixed, seen, "one release", remedy)


def check_fabric(host: Host, *_: object) -> Iterator[HostFinding]:
    """GPUs behind NVSwitch need the fabric manager; without it CUDA fails with error 802."""
    if states := {gpu.fabric for gpu in host.gpus if gpu.fabric is not None}:
        remedy = "start nvidia-fabricmanager, of the driver's own release"
        seen = ", ".join(sorted(states))
        yield judged("NVLink fabric", states == {"ready"}, seen, "ready", remedy)


def check_engine(host: Host, *_: object) -> Iterator[HostFinding]:
    """An engine that hands GPUs to containers: one is enough."""
    able = any(engine.nvidia for engine in host.engines)
    failed: Level = "unknown" if able else "red"
    needed = "docker or podman, with the NVIDIA container toolkit"
    for engine in host.engines:
        seen = f"{engine.name} {engine.version}"
        if not engine.nvidia:
            seen += ", which does not know the GPUs"
        remedy = CONFIGURE[engine.name]
        yield judged("container engine", engine.nvidia, seen, needed, remedy, failed=failed)
    if not host.engines:
        for name, output in host.engine_errors.items():
            if output != NOT_INSTALLED:
                remedy = f"start {name}, or use an account that may talk to it"
                yield judged("container engine", False, f"{name}: {output}", needed, remedy)
        if set(host.engine_errors.values()) == {NOT_INSTALLED}:
            seen = "neither docker nor podman is installed"
            remedy = "install one of them and nvidia-container-toolkit"
            yield judged("container engine", False, seen, needed, remedy)
    remedy = "install nvidia-container-toolkit from NVIDIA's package repository"
    seen = host.toolkit or "nvidia-ctk is not installed"
    yield judged("container toolkit", host.toolkit is not None, seen, needed, remedy, failed=failed)


def check_disk(host: Host, deployment: Deployment, needs: Needs) -> Iterator[HostFinding]:
    """Disk space for the image and, in the volume next to it, the weights."""
    if needs.disk_bytes is None:
        need, purpose = needs.image_bytes, "for the image alone; the weights' size is unknown"
    else:
        need, purpose = needs.disk_bytes, "for image and weights"
    remedy = "free some, or move the engine's data folder to a larger disk"
    finding = _at_least("disk", host.disk_free, need, purpose, remedy)
    yield replace(finding, seen=f"{finding.seen} free below {host.disk_path}")


def check_ram(host: Host, deployment: Deployment, needs: Needs) -> Iterator[HostFinding]:
    """RAM for the shard file that the workers map; then for all of them as page cache."""
    shard, files = needs.ram_bytes, needs.page_cache_bytes
    if files is not None and (host.ram or 0) >= files:
        yield _at_least("RAM", host.ram, files, "for all files", "")
    elif shard is None or files is None:
        seen = "not read" if host.ram is None else gigabytes(host.ram)
        yield HostFinding("RAM", "unknown", seen, _unknown_size(deployment))
    else:
        remedy = "use a host with more RAM: pages of a shard file are read again if they do not fit"
        yield _at_least("RAM", host.ram, shard, "for a shard file", remedy)
        if host.ram is not None and shard <= host.ram:
            needed = f"{gigabytes(files)} to read the weights from disk only once"
            remedy = "none needed: each worker reads all files, so the start takes longer"
            yield HostFinding("page cache", "unknown", gigabytes(host.ram), needed, remedy)


def check_shm(host: Host, deployment: Deployment, needs: Needs) -> Iterator[HostFinding]:
    """The host's /dev/shm, which a server outside a container uses; a container has its own."""
    need = needs.shm_bytes
    remedy = f"mount -o remount,size={need >> 30}g /dev/shm; or serve in the container"
    purpose = "for a server outside a container"
    finding = _at_least("/dev/shm", host.shm, need, purpose, remedy)  # noqa: S108
    able = any(engine.nvidia for engine in host.engines)
    yield replace(finding, level="unknown") if finding.level == "red" and able else finding


def check_machine(host: Host, deployment: Deployment, needs: Needs) -> Iterator[HostFinding]:
    """Processor, kernel modules, health of the GPUs and what connects them."""
    replies, matrix = host.machine, deployment.matrix
    yield from machine.processor(replies["uname"], matrix.base.platform)
    yield from machine.names(replies)
    capability = deployment.cell.sku.compute_capability
    if host.gpus or not replies["nvidia-module"].code:
        yield from machine.kernel_modules(
            replies["nvidia-module"], capability, matrix.kernel_modules
        )
    yield from machine.health(host.gpus, host.gpus_error, replies["nvidia-smi-health"])
    if host.gpus:
        count = min(needs.gpus, len(host.gpus))
        yield from machine.gpu_links(replies, count, deployment.preset.env)
    for engine in host.engines:
        if engine.name == "docker" and engine.nvidia and host.toolkit:
            yield from machine.gpu_injection(replies, engine.cgroups, discovers=engine.discovers)


CHECKS = (
    check_gpus, check_split, check_memory, check_driver, check_mixed_drivers, check_fabric,
    check_machine, check_engine, check_disk, check_ram, check_shm,
)  # fmt: skip


def judge(host: Host, deployment: Deployment, needs: Needs) -> list[HostFinding]:
    return [finding for check in CHECKS for finding in check(host, deployment, needs)]


def page(findings: Iterable[HostFinding]) -> Iterator[Text]:
    """The report for a terminal."""
    colours = {"ok": "green", "unknown": "yellow", "red": "bold red"}
    for finding in findings:
        line = Text(f"{finding.level:8}", style=colours[finding.level])
        line.append(f"{finding.check}: {printable(finding.seen)}", style="default")
        if finding.level == "ok":
            line.append(f"  (needed: {finding.needed})", style="dim")
        else:
            line.append(f"\n        needed: {finding.needed}", style="default")
        if finding.remedy:
            line.append(f"\n        remedy: {finding.remedy}", style="default")
        yield line
