"""What ran on the GPUs: kernels that a server's log states; clocks, power, heat, and slowdowns."""

import contextlib
import os
import re
from pathlib import Path

from vllm_forge.bench.errors import ArmUnknownError
from vllm_forge.bench.results import GpuState
from vllm_forge.host import Probe, printable
from vllm_forge.host.probe import GPU_QUERY, Gpu, parse_gpus

LARGEST_LOG = 16 << 20  # bytes that are read: what a server says when it starts
# Messages of vLLM 0.22.1 to 0.33.0 (of 0.26.0: model_executor/layers/fused_moe/oracle/*.py,
# platforms/cuda.py:422-483, model_executor/kernels/linear/__init__.py:605,
# models/deepseek_v4/attention.py:91-695, v1/worker/gpu_model_runner.py:6845,
# distributed/device_communicators/cuda_communicator.py:265). GPU tests read them, too:
# tests/gpu/harness/bootlog.py, which this program does not carry.
KERNEL = re.compile(
    r"\] (?P<text>Using [^\n]{1,120}? (?:backends?|indexer cache|KV cache format|GEMM|sampling)\b"
    r"|Selected \w+ for [\w.]+|Graph capturing finished)"
)
STATE = "index,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
# A question of its own: older drivers do not know these, and refuse all of them.
SLOWED = "index," + ",".join(
    f"clocks_event_reasons_counters.{name}"
    for name in ("sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
)
# Bits of nvml.h (nvmlClocksEventReason*). The others are expected: idle, set clocks, and the power
# cap, at which a GPU under load is meant to run.
REASONS = {
    0x08: "HW slowdown", 0x20: "SW thermal slowdown", 0x40: "HW thermal slowdown",
    0x80: "HW power brake",
}  # fmt: skip


def kernels_of(log: Path) -> tuple[str, ...] | None:
    """What a server's log says of its kernels, each message once; sorted, as workers race."""
    with log.open("rb") as file:
        text = file.read(LARGEST_LOG).decode(errors="replace")
    return tuple(sorted({printable(match["text"]) for match in KERNEL.finditer(text)})) or None


def listed_gpus(probe: Probe) -> tuple[Gpu, ...]:
    """At least one; ArmUnknownError."""
    reply = probe.ask("nvidia-smi", GPU_QUERY)
    rows = [line for line in reply.text.splitlines() if "," in line and not reply.code]
    with contextlib.suppress(ValueError):
        if gpus := parse_gpus("\n".join(rows)):  # without warnings
            return gpus
    what = f"no GPU is listed: {printable(reply.text).strip()}"
    raise ArmUnknownError(what, where="nvidia-smi", remedy="run this on the host that serves")


def gpu_states(probe: Probe) -> tuple[GpuState, ...]:
    """The GPUs of this process; empty where nvidia-smi does not answer. What it lacks is None."""
    slowed = {row[0]: row[1:] for row in _ask(probe, "nvidia-smi-slowed", SLOWED)}
    states = []
    for index, sm, memory, watts, celsius, reasons in _ask(probe, "nvidia-smi-clocks", STATE):
        counts = [_number(text) for text in slowed.get(index, ["unknown"])]
        mask = int(reasons, 16) if re.fullmatch("0x[0-9a-fA-F]{1,16}", reasons) else None
        states.append(GpuState(
            index=int(index), sm_mhz=_number(sm), memory_mhz=_number(memory),
            watts=_number(watts), celsius=_number(celsius), reasons=mask,
            slowed_us=None if None in counts else sum(filter(None, counts)),
        ))  # fmt: skip
    return tuple(states)


def _ask(probe: Probe, name: str, fields: str) -> list[list[str]]:
    """Rows that have all fields, and an index."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # others' GPUs may be slowed down
    chosen = ("-i", visible) if visible else ()
    argv = ("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", *chosen)
    reply = probe.ask(name, argv)
    rows = [[part.strip() for part in line.split(",")] for line in reply.text.splitlines()]
    count = fields.count(",") + 1
    return [row for row in rows if not reply.code and len(row) == count and row[0].isdecimal()]


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,15}(\.\d+)?", text) else None


def slowdowns(before: tuple[GpuState, ...], after: tuple[GpuState, ...]) -> list[str]:
    """GPUs that were slowed down by heat or by a lack of power at either moment, or between.

    Also those that answered at one moment only: whether they were slowed down is unknown.
    """
    texts, known = [], {gpu.index: gpu for gpu in before}
    if odd := sorted(known.keys() ^ {gpu.index for gpu in after}):
        texts.append(f"GPU {odd[0]} answered only before the window, or only after it")
    for gpu in after:
        if (old := known.get(gpu.index)) is None:
            continue
        mask = (gpu.reasons or 0) | (old.reasons or 0)
        names = [name for bit, name in REASONS.items() if mask & bit]
        if None not in (gpu.slowed_us, old.slowed_us) and gpu.slowed_us != old.slowed_us:
            names.append(f"for {(gpu.slowed_us or 0) - (old.slowed_us or 0):.0f} us")
        if names:
            texts.append(f"GPU {gpu.index} was slowed down: {', '.join(names)}")
    return texts
