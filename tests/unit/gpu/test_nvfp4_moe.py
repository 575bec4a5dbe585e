"""Experts in NVFP4: the bound passes right backends and kills planted faults; for each SKU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gpu.numerics import selected
from tests.gpu.reference import nvfp4_moe_cells as cells
from tests.gpu.reference.marlin_reference import Sums, margin
from tests.gpu.reference.nvfp4_moe import expected
from tests.gpu.reference.nvfp4_moe_cells import Cell
from tests.gpu.reference.planted import InResult, InWeights, in_result, in_weights
from tests.gpu.reference.swiglu import exceeds
from tests.support import emulators
from vllm_forge.checkpoints.codecs.nvfp4 import Nvfp4, unpack
from vllm_forge.kernels.selection.questions import grid_question
from vllm_forge.kernels.selection.record import read_selection
from vllm_forge.matrix import load

ROOT = Path(__file__).parents[3]
SMALL = {"experts": 4, "hidden": 256, "intermediate": 128}
PLACES = 5
each_scheme = pytest.mark.parametrize("quantized", [False, True], ids=["w4a16", "w4a4"])


@cache
def dense(*, quantized: bool, routed: str = "even", seed: int = 1) -> Cell:
    return cells.dense(
        experts=8, hidden=512, intermediate=256, tokens=24, top_k=2, routed=routed,
        quantized=quantized, seed=seed,
    )  # fmt: skip


@cache
def reading(part: str, *, quantized: bool) -> Cell:
    build = cells.read_gate_up if part == "gate_up" else cells.read_down
    return build(**SMALL, quantized=quantized)


def reference(cell: Cell) -> Sums:
    return expected(cell.experts, cell.rows, cell.experts_of, cell.router)


def kernel(cell: Cell) -> np.ndarray:
    return emulators.nvfp4_experts(cell.experts, cell.rows, cell.experts_of, cell.router)


@each_scheme
@pytest.mark.parametrize("routed", ["even", "hot"])
def test_a_right_backend_is_within_the_bound(*, quantized: bool, routed: str) -> None:
    cell = dense(quantized=quantized, routed=routed)
    assert exceeds(cells.both_branches(cell), cells.LIMIT)
    assert 0.01 < margin(kernel(cell), reference(cell)) <= 1


@each_scheme
@pytest.mark.parametrize("part", ["gate_up", "down"])
def test_a_right_backend_reads_within_the_bound(*, quantized: bool, part: str) -> None:
    cell = reading(part, quantized=quantized)
    assert 0.01 < margin(kernel(cell), reference(cell)) <= 1


def test_hot_routing_leaves_experts_without_tokens() -> None:
    used = dense(quantized=False, routed="hot").experts_of
    assert (used[:, 0] == 0).all()
    assert set(used.reshape(-1).tolist()) == {0, 1, 2, 3}


@each_scheme
@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_make_up_the_whole(*, quantized: bool, ranks: int) -> None:
    cell = dense(quantized=quantized)
    parts = [replace(cell, experts=cell.experts.shard(rank, ranks)) for rank in range(ranks)]
    whole, shards = reference(cell), [reference(part) for part in parts]
    slack = sum(part.bound for part in shards)
    total = sum(kernel(part) for part in parts)
    assert (np.abs(total - whole.exact) <= slack + whole.bound).all()
    # A rank that has another's part is no whole.
    wrong = kernel(parts[0]) * ranks
    assert (np.abs(wrong - whole.exact) > slack + whole.bound).any()


@each_scheme
@pytest.mark.parametrize(
    ("fault", "part"), cells.FAULTS, ids=lambda value: getattr(value, "name", value)
)
def test_faults_in_weights_are_killed(*, quantized: bool, fault: InWeights, part: str) -> None:
    cell, rng = reading(part, quantized=quantized), np.random.default_rng(7)
    right, killed = reference(cell), 0
    for _ in range(PLACES):
        broken = in_weights(fault, getattr(cell.experts, part), rng)
        faulty = replace(cell, experts=replace(cell.experts, **dict[str, Any]({part: broken})))
        killed += margin(kernel(faulty), right) > 1
    assert killed == PLACES


@each_scheme
@pytest.mark.parametrize("limit", [None, 1e6, 1.1 * cells.LIMIT])
def test_a_lost_clamp_is_killed(*, quantized: bool, limit: float | None) -> None:
    cell = dense(quantized=quantized)
    lost = replace(cell, experts=replace(cell.experts, limit=limit))
    found = margin(kernel(lost), reference(cell))
    # A limit that is a tenth off is within what quantized activations may lose.
    assert found > 1 or (quantized and limit == 1.1 * cells.LIMIT)


@each_scheme
@pytest.mark.parametrize("fault", InResult)
def test_faults_in_the_result_are_killed(*, quantized: bool, fault: InResult) -> None:
    cell, rng = dense(quantized=quantized), np.random.default_rng(9)
    result, stale = kernel(cell), kernel(dense(quantized=quantized, seed=2))
    right = reference(cell)
    for _ in range(PLACES):
        assert margin(in_result(fault, result, stale, rng), right) > 1


def test_the_tolerance_of_vllm_passes_a_wrong_scale() -> None:
    """0.1 + 0.1 * |x| of its own tests, for one scale that is off by a step."""
    cell, rng = dense(quantized=False), np.random.default_rng(7)
    broken = in_weights(InWeights.ONE_SCALE, cell.experts.gate_up, rng)
    faulty = replace(cell, experts=replace(cell.experts, gate_up=broken))
    difference = np.abs(kernel(faulty) - kernel(cell))
    assert (difference > 0).any()
    assert (difference <= 0.1 + 0.1 * np.abs(kernel(cell))).mean() > 0.99


def test_a_checkpoint_has_the_weights() -> None:
    experts = dense(quantized=True).experts
    tensors: dict[str, Any] = experts.checkpoint()
    assert tensors["w13_weight_packed"].shape == (8, 512, 256)
    assert tensors["w2_weight_scale"].shape == (8, 512, 16)
    for name, weights in (("w13", experts.gate_up), ("w2", experts.down)):
        packed = tensors[f"{name}_weight_packed"][3]
        assert np.array_equal(unpack(packed), weights.codes[3].T)
        found = Nvfp4(
            packed=packed,
            scales=tensors[f"{name}_weight_scale"][3],
            global_scale=tensors[f"{name}_weight_global_scale"][3].reshape(-1)[0],
        )
        assert weights.multiplier is not None
        right = weights.values[3].T * float(weights.multiplier[3])
        np.testing.assert_allclose(found.values(), right, rtol=1e-6)


# --- which backends and kernels are tested --------------------------------------------------------


@pytest.mark.parametrize("sku", load(ROOT).sku)
def test_backends_match_kernel_selection(sku: str) -> None:
    recorded = read_selection(ROOT / "records", selected.LINE)
    answer = recorded.answers[grid_question(sku, selected.ARTIFACT)]
    marker = f"sm_{load(ROOT).sku[sku].compute_capability.replace('.', '')}"
    assert answer.moe is not None
    assert answer.linear is not None
    assert selected.EXPERTS[marker] == answer.moe.chosen
    assert selected.LINEAR[marker] == answer.linear.chosen
