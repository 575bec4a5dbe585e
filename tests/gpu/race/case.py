"""A cell's tensors on the GPU, its launches, and what they must give."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.gpu.reference.marlin_kernel import BLOCKS_PER_SM, ThreadConfig
from tests.gpu.reference.marlin_layout import bfloat16, bfloat16_bits
from tests.gpu.reference.marlin_reference import Routing, Sums, margin, sums
from tests.gpu.reference.marlin_weights import WeightFormat, Weights, random_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.gpu.race.cells import Cell

UNIQUE = 4  # experts with weights of their own; more are copies of them, elsewhere in memory
PATIENCE = 20.0  # seconds; a launch takes microseconds


class HungError(Exception):
    """A launch does not end. The process can do nothing more on this GPU."""


def load_op(library: Path, namespace: str = "_moe_C") -> Callable[..., torch.Tensor]:
    """The op of a library; needs no ``import vllm``."""
    torch.ops.load_library(str(library))
    op: Callable[..., torch.Tensor] = getattr(torch.ops, namespace).moe_wna16_marlin_gemm
    return op


def multiprocessors() -> int:
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


def wait(patience: float | None = None) -> None:
    """Wait until the GPU has done all that it was given.

    Raises:
        HungError: it has not within ``patience`` seconds, by default PATIENCE.
    """
    limit = PATIENCE if patience is None else patience
    deadline = time.monotonic() + limit
    for used in (torch.cuda.current_stream(), *_STREAMS.values()):
        done = torch.cuda.Event()
        done.record(used)
        while not done.query():
            if time.monotonic() > deadline:
                raise HungError(f"the GPU is not done after {limit:g} s")
            os.sched_yield()


_STREAMS: dict[str, torch.cuda.Stream] = {}


def stream(name: str) -> torch.cuda.Stream:
    """A stream of that name, made on first use; :func:`wait` waits for it too."""
    if name not in _STREAMS:
        _STREAMS[name] = torch.cuda.Stream()
    return _STREAMS[name]


@cache
def unique_weights(form: WeightFormat, size_n: int, size_k: int, seed: int = 11) -> Weights:
    return random_weights(form, experts=UNIQUE, size_n=size_n, size_k=size_k, seed=seed)


def to_gpu(array: np.ndarray[Any, Any], kind: str) -> torch.Tensor:
    """By a copy, which tools see as initialization; ``kind`` is torch's dtype."""
    flat = torch.from_numpy(np.ascontiguousarray(array)).cuda()
    return flat.view(getattr(torch, kind)) if flat.dtype != getattr(torch, kind) else flat


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the op is called, where it is not as vLLM calls it."""

    config: ThreadConfig | None = None
    blocks_per_sm: int | None = None
    fp32_reduce: bool = True
    atomic_add: bool = False


class Case:
    """Everything that a cell's launches need, for two inputs that take turns.

    Two, because a launch with the same input leaves in ``c_tmp`` just what the next one will put
    there: a block that reads too early then reads the right sums, and bits repeat.

    Args:
        cell: sizes.
        form: of the weights.
        op: the op under test.
        weights: by default random ones; UNIQUE experts.
        spread_out: whether copies of the experts make up as many as are hit.
        routing: instead of the cell's.
        inputs: bfloat16 values (tokens, k), instead of random ones.
    """

    def __init__(
        self, cell: Cell, form: WeightFormat, op: Callable[..., torch.Tensor],
        *, weights: Weights | None = None, spread_out: bool = True, routing: Routing | None = None,
        inputs: list[np.ndarray[Any, Any]] | None = None,
    ) -> None:  # fmt: skip
        self.cell, self.form, self.op = cell, form, op
        self.hit = (
            cell.experts(form, multiprocessors())
            if routing is None
            else int(routing.experts_of.max()) + 1
        )
        self.routing = routing or cell.routing(self.hit)
        self.weights = weights or unique_weights(form, cell.size_n, cell.size_k)
        rng = np.random.default_rng(23)
        self.inputs = inputs or [
            bfloat16((rng.standard_normal((cell.tokens, cell.size_k)) / 8).astype(np.float32))
            for _ in range(2)
        ]
        self.router = rng.uniform(0.1, 1, (cell.tokens, cell.top_k)).astype(np.float32)
        self.put(self.weights, spread_out=spread_out)
        self.a = [to_gpu(bfloat16_bits(one), "bfloat16") for one in self.inputs]
        self.sorted_ids = to_gpu(self.routing.sorted_ids, "int32")
        ids = self.routing.expert_ids
        copies = ids if spread_out else np.where(ids < 0, ids, ids % self.weights.experts)
        self.expert_ids = to_gpu(copies, "int32")
        self.padded = to_gpu(np.array([self.routing.padded], np.int32), "int32")
        self.topk_weights = to_gpu(self.router, "float32")
        self.workspace = self.new_workspace()
        self.out = self.new_output()
        self._expected: dict[int, Sums] = {}

    def put(self, weights: Weights, *, spread_out: bool = True) -> None:
        """Give the kernel other weights; what results have to be stays."""
        order = torch.arange(max(self.hit, weights.experts), device="cuda") % weights.experts
        packed = to_gpu(weights.packed, "int32")
        scales = to_gpu(weights.packed_scales, self.form.scale_type)
        multiplier = None
        if weights.kernel_multiplier is not None:
            multiplier = to_gpu(weights.kernel_multiplier, "float32")
        if spread_out:
            raw = scales.view(torch.uint8) if scales.element_size() == 1 else scales
            packed, scales = packed[order], raw[order].view(scales.dtype)
            multiplier = None if multiplier is None else multiplier[order].contiguous()
        self.packed, self.scales, self.multiplier = packed, scales, multiplier

    @staticmethod
    def new_workspace() -> torch.Tensor:
        """Locks as vLLM's experts allocate them, by a copy."""
        return to_gpu(np.zeros(BLOCKS_PER_SM * multiprocessors(), np.int32), "int32")

    def new_output(self) -> torch.Tensor:
        """An output full of NaN."""
        rows = self.cell.tokens * self.cell.top_k
        return to_gpu(np.full((rows, self.cell.size_n), 0xFFFF, np.uint16), "bfloat16")

    def launch(
        self, which: int = 0, *, out: torch.Tensor | None = None, options: Options | None = None
    ) -> torch.Tensor:
        """One launch on the current stream.

        Raises:
            RuntimeError: the op refuses the configuration.
        """
        cell, chosen = self.cell, options or Options()
        config = chosen.config or cell.config
        per_sm = chosen.blocks_per_sm or cell.blocks_per_sm
        out = self.out if out is None else out
        self.op(
            self.a[which], out, self.packed, None, self.scales, None, self.multiplier, None, None,
            None, self.workspace, self.sorted_ids, self.expert_ids, self.padded, self.topk_weights,
            cell.block, cell.top_k, cell.router, self.form.type_id, cell.tokens, cell.size_n,
            cell.size_k, True, chosen.atomic_add, chosen.fp32_reduce, False,
            config.k if config else -1, config.n if config else -1, per_sm if config else -1,
        )  # fmt: skip
        return out

    def expected(self, which: int = 0) -> Sums:
        """What an input must give."""
        if which not in self._expected:
            routing = replace(
                self.routing, experts_of=self.routing.experts_of % self.weights.experts
            )
            router = self.router if self.cell.router else None
            self._expected[which] = sums(self.weights, routing, self.inputs[which], router)
        return self._expected[which]

    def margin(self, result: torch.Tensor, which: int = 0) -> float:
        """The largest error as a share of its bound."""
        return margin(result.double().cpu().numpy(), self.expected(which))


@cache
def shared_case(cell: Cell, form: WeightFormat, op: Callable[..., torch.Tensor]) -> Case:
    """The case of a cell, made once: its reference takes longer than its launches."""
    return Case(cell, form, op)
