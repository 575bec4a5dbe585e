"""The machine below the GPUs: processor, kernel modules, health, links between GPUs, toolkit."""

import re
import socket
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

from vllm_forge.host import Probe, Reply
from vllm_forge.host.probe import HEALTH_FIELDS, NOT_APPLICABLE, TIMED_OUT, Gpu
from vllm_forge.matrix import KernelModules

# Name of a question -> its command. All of them only read.
QUESTIONS: dict[str, Sequence[str]] = {
    "uname": ("uname", "-m"),
    "nvidia-module": ("cat", "/proc/driver/nvidia/version"),
    "nvidia-smi-health": (
        "nvidia-smi", f"--query-gpu={HEALTH_FIELDS}", "--format=csv,noheader,nounits",
    ),
    "nvidia-smi-topo": ("nvidia-smi", "topo", "-m"),
    # p: over PCIe, as NCCL's troubleshooting guide asks.
    "nvidia-smi-p2p": ("nvidia-smi", "topo", "-p2p", "p"),
    "iommu": ("grep", "-rs", ".", "--include=type", "/sys/kernel/iommu_groups"),
    "pci-bridges": ("lspci", "-vv", "-d", "::0604"),  # bridges alone
    "nvidia-runtime": ("cat", "/etc/nvidia-container-runtime/config.toml"),
    "own-name": ("timeout", "2", "getent", "ahosts", socket.gethostname()),
    # Of a documentation network (RFC 5737): only a name server knows whether it has a name.
    "name-server": ("timeout", "2", "getent", "-s", "dns", "hosts", "192.0.2.1"),
    "nvidia-char": ("find", "/dev/char", "-lname", "*nvidia[0-9]*"),
}  # fmt: skip
NCCL_GUIDE = (
    "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting/"
    "gpu_troubleshooting.html"
)
XID_GUIDE = "https://docs.nvidia.com/deploy/xid-errors/"
DETACH = "`systemctl daemon-reload` runs (https://github.com/NVIDIA/nvidia-docker/issues/1730)"
HOOK_REFUSES = "https://github.com/dstackai/dstack/issues/2306"
# What else passes traffic between GPUs; in a preset's env it takes NCCL's peer access away.
NO_PEERS = ("NCCL_P2P_DISABLE", "1")
MOST_SHOWN = 300  # characters of an answer
# What nvidia-smi says of a GPU in a line between the rows of the others.
LOST = re.compile(r"^[^,]*(unable to determine the device handle|is lost|requires reset)", re.I)
OPTIONAL = ("nvidia-smi", "lspci")  # programs that may not be installed

Level = Literal["ok", "unknown", "red"]


@dataclass(frozen=True)
class HostFinding:
    """One line of the report. A check that cannot be judged is ``unknown``, and does not fail."""

    check: str
    level: Level
    seen: str
    needed: str
    remedy: str = ""


def judged(
    check: str, passed: bool, seen: str, needed: str, remedy: str = "", *, failed: Level = "red"
) -> HostFinding:
    return HostFinding(check, "ok" if passed else failed, seen, needed, "" if passed else remedy)


def one_line(reply: Reply) -> str:
    lines = [line.strip() for line in reply.text.splitlines() if line.strip()]
    return "; ".join(lines)[:MOST_SHOWN] if lines else f"exit {reply.code} without a word"


def ask_machine(probe: Probe) -> dict[str, Reply]:
    """Ask all at once: nvidia-smi takes a part of a second each time."""
    with ThreadPoolExecutor() as pool:
        replies = pool.map(probe.ask, QUESTIONS.keys(), QUESTIONS.values())
        return dict(zip(QUESTIONS, replies, strict=True))


def _unread(check: str, name: str, reply: Reply, needed: str) -> HostFinding:
    """A question without an answer; recordings of older versions do not have all of them."""
    seen, program = one_line(reply), QUESTIONS[name][0]
    if reply.missing:
        seen = f"not recorded, or {program} is not installed"
        seen = seen if program in OPTIONAL else "not recorded"
    return HostFinding(check, "unknown", seen, needed)


def processor(reply: Reply, platform: str) -> Iterator[HostFinding]:
    """A processor that runs the image; ``platform`` is uv's name of the wheels' platform."""
    built, seen = platform.partition("-")[0], one_line(reply)
    if reply.code:
        yield _unread("processor", "uname", reply, built)
        return
    needed = f"{built}: images are built for it alone"
    yield judged("processor", seen == built, seen, needed, f"use a host with a {built} processor")


def names(replies: Mapping[str, Reply]) -> Iterator[HostFinding]:
    """Names of hosts that are found, or not, at once; vLLM's processes wait for each."""
    needed = "an answer within 2 s: otherwise each start of vLLM takes 10 to 40 s longer"
    asked = ("own-name", "name-server")
    if absent := [name for name in asked if replies[name].missing]:
        yield _unread("host names", absent[0], replies[absent[0]], needed)
        return
    slow = [name.replace("-", " ") for name in asked if replies[name].code == TIMED_OUT]
    seen = f"no answer: {', '.join(slow)}" if slow else "answered"
    remedy = "serve with --env 'RES_OPTIONS=timeout:1 attempts:1', or repair /etc/resolv.conf; "
    remedy += "without a container: names in /etc/hosts (docs/operate/offline.md)"
    yield judged("host names", not slow, seen, needed, remedy, failed="unknown")


def kernel_modules(
    reply: Reply, capability: str, rule: KernelModules | None
) -> Iterator[HostFinding]:
    """The open kernel modules, for GPUs that the proprietary ones do not drive.

    The driver's README shows both texts: ``Open Kernel Module for x86_64`` and ``x86_64 Kernel
    Module``.
    """
    if rule is None or Version(capability) < Version(rule.open_from):
        return
    needed = f"the open ones, for compute capability {rule.open_from} and above ({rule.source})"
    version = re.search(r"^NVRM version:\s*(.*)$", reply.text, re.M)
    if reply.code or version is None:
        yield _unread("kernel modules", "nvidia-module", reply, needed)
        return
    remedy = "replace the proprietary modules by the open ones of the same driver release (package "
    remedy += "nvidia-open of NVIDIA's repository; .run file: --kernel-module-type=open), reboot"
    flavour, *_ = re.split(r"\s{2,}", version[1])
    is_open = "Open Kernel Module" in flavour
    yield judged("kernel modules", is_open, flavour, needed, remedy)


def health(gpus: Sequence[Gpu], error: str, reply: Reply) -> Iterator[HostFinding]:
    """No GPU that is lost, counts uncorrectable memory errors or waits for a reset."""
    needed = f"no lost GPU, no uncorrectable memory error, no pending reset ({XID_GUIDE})"
    faults = [f"GPU {gpu.index}: {gpu.fault}" for gpu in gpus if gpu.fault]
    faults += [line for line in (error, *reply.text.splitlines()) if LOST.search(line)]
    fields = HEALTH_FIELDS.split(",")
    rows = [row.split(",") for row in reply.text.splitlines() if row.count(",") == len(fields) - 1]
    for number, row in enumerate(rows):
        for name, value in zip(fields, map(str.strip, row), strict=True):
            fine = {str(number)} if name == "index" else {*NOT_APPLICABLE, "0", "No", "None"}
            if value not in fine:
                faults.append(f"GPU {number}: {name} is {value}")
    if faults:
        remedy = "end what runs there, then `nvidia-smi --gpu-reset -i N` as root, or reboot; "
        remedy += "`dmesg | grep -i xid` has the reason; if it comes back, have the GPU replaced"
        yield judged("GPU health", False, "; ".join(dict.fromkeys(faults)), needed, remedy)
    elif len(rows) != len(gpus):  # also where a driver does not know a field
        yield _unread("GPU health", "nvidia-smi-health", reply, needed)
    elif gpus:
        yield judged("GPU health", True, f"{len(rows)} GPUs without a fault", needed)


def link_kinds(text: str) -> set[str]:
    """What connects the GPUs, by a matrix of ``nvidia-smi topo``: NV18, PHB, OK, GNS and so on."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)  # the head is underlined
    rows = [line.split() for line in plain.splitlines() if re.match(r"\s*GPU\d+\s", line)]
    rows = [row for row in rows if not all(re.fullmatch(r"GPU\d+", cell) for cell in row[:2])]
    return {cell for row in rows for cell in row[1 : 1 + len(rows)]} - {"X"}


def gpu_links(
    replies: Mapping[str, Reply], count: int, environment: Mapping[str, str]
) -> Iterator[HostFinding]:
    """Traffic between ``count`` GPUs over PCIe: peer access, and what stops it."""
    topology, peers = replies["nvidia-smi-topo"], replies["nvidia-smi-p2p"]
    if count < 2:  # noqa: PLR2004 - one GPU has no peer
        return
    needed = "NVLink, or peer access over PCIe; otherwise NCCL copies through host memory"
    links = set() if topology.code else link_kinds(topology.text)
    if not links:
        yield _unread("GPU links", "nvidia-smi-topo", topology, needed)
        return
    if all(link.startswith("NV") for link in links):
        yield judged("GPU links", True, f"NVLink ({', '.join(sorted(links))})", needed)
        return
    access = set() if peers.code else link_kinds(peers.text)
    seen = f"PCIe ({', '.join(sorted(links))}), peer access: {', '.join(sorted(access)) or '?'}"
    yield judged("GPU links", bool(access), seen, needed, failed="unknown")
    name, value = NO_PEERS
    if environment.get(name) != value and (not access or "OK" in access):
        yield from _check_iommu(replies["iommu"])
        yield from _check_acs(replies["pci-bridges"])


def _check_iommu(reply: Reply) -> Iterator[HostFinding]:
    """No IOMMU that translates addresses of copies between GPUs.

    The kernel's name of a group's domain is DMA or DMA-FQ where it translates, and identity where
    it passes through (Documentation/ABI/testing/sysfs-kernel-iommu_groups).
    """
    needed = f"off, or passthrough: NCCL hangs, or copies are lost ({NCCL_GUIDE})"
    # grep ends with 1 where no group has a type: the IOMMU is off.
    if reply.code not in (0, 1) or (reply.code == 0 and ":" not in reply.text):
        yield _unread("IOMMU", "iommu", reply, needed)
        return
    kinds = sorted({line.rpartition(":")[2].strip() for line in reply.text.splitlines()} - {""})
    translates = any(kind.startswith("DMA") for kind in kinds)
    seen = ("translates: " if translates else "") + (", ".join(kinds) or "off")
    remedy = "boot with iommu=pt, or switch it off in the BIOS (VT-d, AMD-Vi); without a reboot: "
    remedy += f"{'='.join(NO_PEERS)} in the preset's env, which is slower"
    yield judged("IOMMU", not translates, seen, needed, remedy)


def _check_acs(reply: Reply) -> Iterator[HostFinding]:
    """PCI bridges that send what one GPU writes to another through the processor."""
    needed = f"off: it slows traffic between GPUs down, and may hang it ({NCCL_GUIDE})"
    states = re.findall(r"^\s*ACSCtl:\s*(.*)$", reply.text, re.M)
    if reply.code or (not states and "access denied" in reply.text):
        denied = reply if reply.code else Reply(code=1, text="readable for root only")
        yield _unread("PCIe ACS", "pci-bridges", denied, needed)
        return
    redirecting = [state for state in states if re.search(r"(SrcValid|Redir)\+", state)]
    remedy = "switch ACS off in the BIOS; until the next boot, for each bridge, as root: "
    remedy += "setpci -s BRIDGE ECAP_ACS+0x6.w=0000"
    seen = f"on for {len(redirecting)} of {len(states)} bridges that have it"
    yield judged("PCIe ACS", not redirecting, seen, needed, remedy, failed="unknown")


def gpu_injection(
    replies: Mapping[str, Reply], cgroups: str, *, discovers: bool
) -> Iterator[HostFinding]:
    """How ``docker run --gpus`` gets its devices, and whether it keeps them.

    ``cgroups``: docker's cgroup driver; ``discovers``: docker knows CDI devices itself.
    """
    reply, links = replies["nvidia-runtime"], replies["nvidia-char"]
    needed = f"not cdi: the hook of `docker run --gpus` refuses to work then ({HOOK_REFUSES})"
    try:
        mode = str(tomllib.loads(reply.text)["nvidia-container-runtime"]["mode"])
    except (ValueError, LookupError, TypeError):
        yield _unread("container toolkit mode", "nvidia-runtime", reply, needed)
    else:
        remedy = "nvidia-ctk config --in-place --set nvidia-container-runtime.mode=auto"
        level: Level = "unknown" if discovers else "red"
        yield judged("container toolkit mode", mode != "cdi", mode, needed, remedy, failed=level)
    if cgroups != "systemd":
        return
    needed = "links to the GPUs in /dev/char: without them a container loses its GPUs when "
    needed += DETACH
    if links.missing:
        yield _unread("device links", "nvidia-char", links, needed)
        return
    remedy = "nvidia-ctk system create-dev-char-symlinks --create-all, at each boot; or "
    remedy += '"exec-opts": ["native.cgroupdriver=cgroupfs"] in /etc/docker/daemon.json'
    count = len(links.text.splitlines())
    yield judged("device links", count > 0, str(count), needed, remedy, failed="unknown")
