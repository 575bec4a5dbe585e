"""One experiment in a process of its own: it may hang or lose the GPU, and nothing else with it.

    python -m tests.gpu.race.child '{"do": "mutant", "name": "no_reset"}'

The last line on stdout is a JSON object. A launch that does not end is an answer too: the process
then leaves without the CUDA runtime's farewell, which would wait for it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.gpu.race import case, cells
from tests.gpu.race.case import Case, HungError, Options, load_op, multiprocessors, wait
from tests.gpu.race.experiments import MICRO, OVERRUN
from tests.gpu.race.kit import folder, native_library, wheel_library
from tests.gpu.race.repeat import Budget, Counts, Repeater, Tools, micro_inputs, two_streams
from tests.gpu.reference.marlin_kernel import c_tmp_size, reduce_end
from tests.gpu.reference.marlin_schedule import locks_used, schedule
from tests.gpu.reference.marlin_weights import FORMATS, NVFP4, W4A16

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


BY_NAME = {form.name: form for form in FORMATS}
HANG = 4.0  # seconds until a launch counts as hung; the rest of the GPU's work is short
NO_ADDRESS = 2**63 - 1  # of red_zones.cu: nothing was written there


class Zone(ctypes.Structure):
    """A block as red_zones.cu records it."""

    _fields_ = [
        (name, ctypes.c_long) for name in ("size", "first_outside", "last_outside", "last_inside")
    ]


def op_of(name: str) -> Callable[..., torch.Tensor]:
    """The wheel's op, or a mutant's."""
    if name == "wheel":
        return load_op(wheel_library())
    return load_op(native_library(name), f"forge_{name}")


def mutant(name: str) -> dict[str, Any]:
    """What each detector says of a build of the kernel, in three partitions."""
    op, tools = op_of(name), Tools(native_library("tools"))
    seen = Seen()
    for cell, form in ((cells.CORE[0], NVFP4), (cells.DEEP, W4A16), (cells.CORE[1], NVFP4)):
        with seen.watch():
            seen.observe(Case(cell, form, op), tools)
    return seen.row


def option(name: str) -> dict[str, Any]:
    """The wheel's kernel with the sum in 16 bits, or by atomics in any order."""
    op, tools = op_of("wheel"), Tools(native_library("tools"))
    options = Options(fp32_reduce=name != "half_reduce", atomic_add=name == "atomic_add")
    seen = Seen()
    for cell, form in ((cells.DEEP, NVFP4), (cells.CORE[0], NVFP4)):
        with seen.watch():
            seen.observe(Case(cell, form, op), tools, options)
    return seen.row


def dirty_workspace() -> dict[str, Any]:
    """One lock that a tile in two parts uses is not zero on entry."""
    op = op_of("wheel")
    seen = Seen()
    with seen.watch():
        made = Case(cells.CORE[0], NVFP4, op)
        launch = made.cell.launch(NVFP4, multiprocessors(), made.hit)
        lock = next(p.lock for block in schedule(launch) for p in block if p.count > 1)
        made.workspace[lock] = 1
        seen.first_launch(made)
    return seen.row


def streams(shared: bool) -> dict[str, Any]:
    """Two launches at a time, each of few blocks, so that both are on the GPU."""
    op, tools = op_of("wheel"), Tools(native_library("tools"))
    seen = Seen()
    pair = [Case(cells.ONE_TILE, form, op) for form in (NVFP4, W4A16)]
    with seen.watch():
        seen.count("differ", two_streams(pair, tools, Budget(seconds=3.0), shared=shared))
    return seen.row


def micro(name: str) -> dict[str, Any]:
    """The sum alone, in plain CUDA, with a fault."""
    tools = Tools(native_library("tools")).library
    tiles, parts, k, n = 96, 6, 512, 128
    made = micro_inputs(tiles, parts, k, n)
    exact = torch.einsum("k,tkn->tn", made["a"].double(), made["w"].double())
    size = torch.einsum("k,tkn->tn", made["a"].double().abs(), made["w"].double().abs())
    row: dict[str, Any] = {"launches": 0, "differ": 0, "margin": 0.0, "dirty": 0, "hung": False}
    first = None
    for number in range(200):
        made["slots"].fill_(float("nan"))
        pointers = [
            ctypes.c_void_p(made[key].data_ptr()) for key in ("a", "w", "out", "slots", "locks")
        ]
        error = tools.micro_launch(
            MICRO.index(name), *pointers, k, tiles, parts, n, 4000,
            ctypes.c_void_p(made["hung"].data_ptr()),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
        if error:
            raise RuntimeError(f"micro_launch: CUDA error {error}")
        wait()
        result = made["out"].clone()
        first = result if first is None else first
        error_share = ((result.double() - exact).abs() / ((k + 8) * 2.0**-24 * size)).max()
        row["launches"] = number + 1
        row["differ"] += int(not torch.equal(result.view(torch.int32), first.view(torch.int32)))
        row["margin"] = _worse(row["margin"], float(error_share))
        row["dirty"] += int(bool(made["locks"].any()))
        row["hung"] = bool(made["hung"].item())
        if row["hung"]:
            break
    return row


def zones(name: str, short: int = 0) -> dict[str, Any]:
    """Launches between red zones, in memory full of NaN.

    Args:
        name: wheel, or a mutant.
        short: bytes that c_tmp lacks of what the launch uses; only the mutant listens to it.

    Returns:
        Buffers that were written around and how far, NaN in results, and for each launch the last
        float of c_tmp that was written and the last that the model of the kernel knows of.
    """
    path = native_library("red_zones")
    allocator = torch.cuda.memory.CUDAPluggableAllocator(str(path), "zones_malloc", "zones_free")
    torch.cuda.memory.change_current_allocator(allocator)
    library = ctypes.CDLL(str(path))
    op = op_of(name)
    forms = FORMATS if name == "wheel" else (NVFP4, W4A16)
    listed = (*cells.CORE, *cells.MORE, cells.ONE_TILE) if name == "wheel" else (cells.CORE[0],)
    row: dict[str, Any] = {"bad": 0, "nan": 0, "launches": 0, "used": [], "outside": []}
    for form in forms:
        for cell in listed:
            _zoned(Case(cell, form, op, spread_out=False), library, short, row)
    return row


def _zoned(case: Case, library: ctypes.CDLL, short: int, row: dict[str, Any]) -> None:
    records, count = (Zone * 4096)(), ctypes.c_long()
    row["bad"] += library.zones_check(records, 4096, ctypes.byref(count))
    sms, cell = multiprocessors(), case.cell
    known = cell.config is not None
    launch = cell.launch(case.form, sms, case.hit) if known else None
    end = reduce_end(launch.kernel, locks_used(schedule(launch)) - 1) if launch else 0
    if short:
        os.environ["C_TMP_FLOATS"] = str(end - short // 4)
    for which in (0, 1):
        out = case.launch(which, out=case.new_output())
        wait()
        row["launches"] += 1
        row["nan"] += int(torch.isnan(out).any())
        row["margin"] = _worse(row.get("margin", 0.0), case.margin(out, which))
        row["bad"] += library.zones_check(records, 4096, ctypes.byref(count))
        freed = [records[i] for i in range(count.value)]
        row["outside"] += [
            [zone.size, zone.first_outside, zone.last_outside]
            for zone in freed
            if zone.first_outside != NO_ADDRESS
        ]
        if launch is None:
            continue
        size = 4 * c_tmp_size(launch.kernel, cell.size_n, len(case.routing.sorted_ids), sms)
        size = 4 * (end - short // 4) if short else size
        used = [zone.last_inside for zone in freed if zone.size == size]
        row["used"].append([cell.name, case.form.name, [u // 4 for u in used], end - 1, size // 4])


def sanitized(names: list[str]) -> dict[str, Any]:
    """One launch per format and build, small enough for compute-sanitizer."""
    for name in names:
        op = op_of(name)
        for form in FORMATS if name == "wheel" else (NVFP4, W4A16):
            made = Case(cells.SANITIZED, form, op, spread_out=False)
            if name == "short_c_tmp":
                launch = made.cell.launch(form, multiprocessors(), made.hit)
                end = reduce_end(launch.kernel, locks_used(schedule(launch)) - 1)
                os.environ["C_TMP_FLOATS"] = str(end - OVERRUN // 4)
            made.launch()
            wait(60)
    return {"launched": names}


def warm(form: str) -> dict[str, Any]:
    """Let the driver compile a format's kernels, for the cache that other processes share."""
    started = time.monotonic()
    lock = (folder() / f"warm-{form}.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second finds them there
    made = Case(cells.CORE[0], BY_NAME[form], op_of("wheel"), spread_out=False)
    made.launch()
    wait(300)
    return {"seconds": round(time.monotonic() - started, 1)}


class Seen:
    """What the detectors say of launches, as a row."""

    def __init__(self) -> None:
        self.row: dict[str, Any] = {
            "launches": 0, "differ_one_input": 0, "differ": 0, "dirty": 0, "margin": 0.0, "nan": 0,
            "partition": 0.0, "hung": False,
        }  # fmt: skip

    @contextmanager
    def watch(self) -> Iterator[None]:
        """If a launch does not end, or ends the context, say so and leave."""
        try:
            yield
        except HungError:
            self._leave("a launch does not end")
        except RuntimeError as error:
            if "CUDA error" not in str(error):
                raise
            self._leave(str(error).splitlines()[0])

    def _leave(self, why: str) -> None:
        self.row |= {"hung": True, "why": why}
        print(json.dumps(self.row), flush=True)
        os._exit(0)

    def count(self, key: str, counts: Counts) -> None:
        """Add what was counted; ``key``: of the results that differ."""
        self.row["launches"] += counts.launches
        self.row[key] += counts.differ
        self.row["dirty"] += counts.dirty

    def first_launch(
        self, case: Case, options: Options | None = None, which: int = 0
    ) -> torch.Tensor:
        """Detectors of a single launch: reference, NaN left of the output, locks."""
        out = case.launch(which, out=case.new_output(), options=options)
        wait(HANG)
        row = self.row
        row["launches"] += 1
        row["nan"] += int(torch.isnan(out).any())
        row["margin"] = _worse(row["margin"], case.margin(out, which))
        row["dirty"] += int(bool(case.workspace.any()))
        return out

    def observe(self, case: Case, tools: Tools, options: Options | None = None) -> None:
        """All detectors, on a workspace that starts as zeros."""
        outs = [self.first_launch(case, options, which) for which in (0, 1)]
        other = replace(options or Options(), blocks_per_sm=2)
        cut = case.launch(0, out=case.new_output(), options=other)
        wait(HANG)
        both = 2 * case.expected(0).bound
        apart = np.abs((cut.double() - outs[0].double()).cpu().numpy()) / np.maximum(both, 1e-300)
        self.row["partition"] = _worse(self.row["partition"], float(apart.max()))
        for inputs, key in ((1, "differ_one_input"), (2, "differ")):
            case.workspace = case.new_workspace()
            repeater = Repeater(case, tools, inputs=inputs, options=options)
            started, steps = time.monotonic(), 0
            while steps < 3000 and time.monotonic() - started < 1.0:
                for _ in range(100):
                    repeater.step()
                    steps += 1
                if repeater.counts.differ:
                    break
            self.count(key, repeater.counts)


def _worse(a: float, b: float) -> float:
    """The larger; not a number is the worst, as 1e30, which JSON can hold."""
    return 1e30 if not (np.isfinite(a) and np.isfinite(b)) else max(a, b)


EXPERIMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "mutant": mutant,
    "option": option,
    "dirty_workspace": dirty_workspace,
    "streams": streams,
    "micro": micro,
    "zones": zones,
    "sanitized": sanitized,
    "warm": warm,
}


def main() -> None:
    order = json.loads(sys.argv[1])
    case.PATIENCE = HANG
    print(json.dumps(EXPERIMENTS[order.pop("do")](**order)), flush=True)


if __name__ == "__main__":
    main()
