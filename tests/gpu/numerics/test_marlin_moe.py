"""The Marlin MoE kernel computes what its weights say, by a bound that planted faults exceed.

Each format is read out weight by weight, bit for bit, and in dense sums within the bound of
``numerics/marlin_reference.py``; nothing here is a tolerance that was tuned.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.gpu.numerics.layers import values
from tests.gpu.race.cells import DOWN, GATE_UP, Cell
from tests.gpu.race.kit import BASE, wheel_library
from tests.gpu.reference import planted
from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.reference.marlin_reference import (
    margin,
    read_out,
    route,
    spread,
    sums,
)
from tests.gpu.reference.marlin_weights import (
    FORMATS,
    NVFP4,
    W4A16,
    WeightFormat,
    Weights,
    random_weights,
)
from tests.gpu.reference.swiglu import activated, exceeds

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from tests.gpu.conftest import Record
    from tests.gpu.race.case import Case

    Op = Callable[..., torch.Tensor]

pytestmark = [pytest.mark.gpu, pytest.mark.tier("kernel")]

EXPERTS = 2
LIMIT = 10.0  # DeepSeek-V4's swiglu_limit
# At tensor parallel 4, and sizes that only the smallest tiles divide.
READ = ((1024, 4096), (4096, 512), (192, 640), (320, 1152))


@cache
def weights_of(form: WeightFormat, size_n: int, size_k: int) -> Weights:
    return random_weights(form, experts=EXPERTS, size_n=size_n, size_k=size_k, seed=31)


def reader(op: Op, form: WeightFormat, weights: Weights) -> Case:
    """A case whose result is the weights: each expert gets the identity."""
    from tests.gpu.race.case import Case

    k = weights.size_k
    experts_of = np.repeat(np.arange(EXPERTS), k)[:, None]
    cell = Cell(
        name="read", size_n=weights.size_n, size_k=k, tokens=EXPERTS * k, block=64, config=None
    )
    rows = np.tile(np.eye(k), (EXPERTS, 1))
    return Case(
        cell, form, op, weights=weights, routing=route(experts_of, EXPERTS, 64),
        inputs=[rows], spread_out=False,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize(("size_n", "size_k"), READ)
def test_every_weight_is_read_exactly(
    op: Op, record: Record, form: WeightFormat, size_n: int, size_k: int
) -> None:
    weights = weights_of(form, size_n, size_k)
    case = reader(op, form, weights)
    result = values(case.launch(out=case.new_output()))
    expected = read_out(weights, case.routing)
    wrong = int((result != expected).sum())
    record(kind="numerics", format=form.name, cell=f"read {size_n}x{size_k}", wrong=wrong,
           weights=expected.size, launches=1)  # fmt: skip
    first = np.argwhere(result != expected)[:3].tolist()
    assert wrong == 0, f"{wrong} of {expected.size} weights are wrong, the first at {first}"


def routes(kind: str, tokens: int) -> np.ndarray[Any, Any]:
    if kind == "even":
        return spread(tokens, 2, 24)
    if kind == "hot":  # one expert has half of all rows, most have none
        return np.stack([np.zeros(tokens, np.int32), 1 + np.arange(tokens, dtype=np.int32) % 20], 1)
    return np.random.default_rng(5).permuted(np.tile(np.arange(24), (tokens, 1)), axis=1)[:, :2]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("routed", ["even", "hot", "random"])
@pytest.mark.parametrize("which", ["gate_up", "down"])
def test_sums_are_within_the_bound(
    op: Op, record: Record, form: WeightFormat, routed: str, which: str
) -> None:
    """As served, for each block size and few to many tokens."""
    from tests.gpu.race.case import Case

    size = GATE_UP if which == "gate_up" else DOWN
    margins = {}
    for block, tokens in ((8, 1), (8, 9), (16, 33), (32, 64), (48, 100), (64, 257)):
        routing = route(routes(routed, tokens), 24, block)
        cell = Cell(
            name=which, **size, tokens=tokens, top_k=2, block=block, router=which == "down",
            config=None,
        )  # fmt: skip
        case = Case(cell, form, op, routing=routing)
        out = case.launch(out=case.new_output())
        margins[f"{tokens} tokens, blocks of {block}"] = case.margin(out)
        assert not case.workspace.any()
    record(kind="numerics", format=form.name, cell=f"{which} {routed}", margins=margins,
           margin=max(margins.values()), launches=len(margins))  # fmt: skip
    assert max(margins.values()) <= 1, margins


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_make_up_the_whole(op: Op, record: Record, form: WeightFormat, ranks: int) -> None:
    """Columns of the first GEMM, and the sum over shards of K of the second, for each TP size."""
    from tests.gpu.race.case import Case

    whole = weights_of(form, 1024, 2048)
    experts_of = spread(12, 2, EXPERTS)
    rows = bfloat16((np.random.default_rng(8).standard_normal((12, 2048)) / 8).astype(np.float32))
    reference = sums(whole, route(experts_of, EXPERTS, 8), rows)
    columns, total, slack = [], np.zeros_like(reference.exact), np.zeros_like(reference.exact)
    for rank in range(ranks):
        n = slice(rank * 1024 // ranks, (rank + 1) * 1024 // ranks)
        k = slice(rank * 2048 // ranks, (rank + 1) * 2048 // ranks)
        g = slice(k.start // form.group, k.stop // form.group)
        by_n = replace(whole, codes=whole.codes[:, :, n], scales=whole.scales[:, :, n])
        by_k = replace(whole, codes=whole.codes[:, k], scales=whole.scales[:, g])
        for part, inputs in ((by_n, rows), (by_k, rows[:, k])):
            cell = Cell(
                name="shard", size_n=part.size_n, size_k=part.size_k, tokens=12, top_k=2,
                config=None,
            )  # fmt: skip
            case = Case(
                cell, form, op, weights=part, routing=route(experts_of, EXPERTS, 8),
                inputs=[inputs], spread_out=False,
            )  # fmt: skip
            result = values(case.launch(out=case.new_output()))
            if part is by_n:
                columns.append(result)
            else:
                total += result
                slack += case.expected(0).bound
    by_column = margin(np.hstack(columns), reference)
    by_sum = float((np.abs(total - reference.exact) / slack).max())
    record(kind="numerics", format=form.name, cell=f"shards {ranks}",
           margins={"columns": by_column, "sum": by_sum}, margin=max(by_column, by_sum),
           launches=2 * ranks)  # fmt: skip
    assert by_column <= 1
    assert by_sum <= 1


# --- the bound kills planted faults, on the real kernel -------------------------------------------


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("fault", planted.InWeights)
def test_a_fault_in_the_weights_is_noticed(
    op: Op, record: Record, form: WeightFormat, fault: planted.InWeights
) -> None:
    right = weights_of(form, 192, 640)
    case, rng = reader(op, form, right), np.random.default_rng(17)
    expected, noticed = read_out(right, case.routing), []
    for _ in range(planted.PLACES):
        case.put(planted.in_weights(fault, right, rng), spread_out=False)
        noticed.append(bool((values(case.launch(out=case.new_output())) != expected).any()))
    planted.require_noticed(record, fault.name, noticed, kind="kill", format=form.name)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("fault", planted.InResult)
def test_a_fault_in_the_result_is_noticed(
    op: Op, record: Record, form: WeightFormat, fault: planted.InResult
) -> None:
    from tests.gpu.race.case import Case

    cell = Cell(name="result", **DOWN, tokens=16, top_k=2, hit=4, config=None)
    case = Case(cell, form, op)
    results = [values(case.launch(i, out=case.new_output())) for i in (0, 1)]
    planted.require_result_noticed(
        record, fault, results, case.expected(0), 19, kind="kill", format=form.name
    )


# --- both GEMMs with the activation between them --------------------------------------------------


@pytest.fixture(scope="session")
def activation() -> Any:
    """Namespace ``_C`` with the activations of the line."""
    import torch

    torch.ops.load_library(str(wheel_library(BASE)))
    return torch.ops._C


@pytest.mark.parametrize("form", [NVFP4, W4A16], ids=lambda form: form.name)
def test_the_experts_clamp_between_their_gemms(
    op: Op, activation: Any, record: Record, form: WeightFormat
) -> None:
    """Stage by stage, each from what the one before really gave; a lost clamp is noticed."""
    import torch

    from tests.gpu.race.case import Case

    tokens, top_k = 9, 6
    experts_of = spread(tokens, top_k, 24)
    up = Cell(name="gate_up", **GATE_UP, tokens=tokens, top_k=top_k, config=None)
    probe = Case(up, form, op, routing=route(experts_of, 24, 8))
    # Inputs so large that gate and up exceed the limit.
    size = 1.5 * LIMIT / float(np.std(probe.expected(0).exact))
    rows = bfloat16((probe.inputs[0] * size).astype(np.float32))
    first = Case(up, form, op, routing=route(experts_of, 24, 8), inputs=[rows])
    both = first.launch(out=first.new_output())
    margins = {"first gemm": first.margin(both)}
    assert exceeds(values(both), LIMIT)

    middle = torch.empty(tokens * top_k, 512, dtype=torch.bfloat16, device="cuda")
    activation.silu_and_mul_with_clamp(middle, both, LIMIT)
    margins["activation"] = margin(values(middle), activated(values(both), LIMIT))

    down = Cell(name="down", **DOWN, tokens=tokens * top_k, router=True, config=None)
    routing = route(experts_of.reshape(-1, 1), 24, 8)
    inputs = values(middle)
    second = Case(down, form, op, routing=routing, inputs=[inputs])
    margins["second gemm"] = second.margin(second.launch(out=second.new_output()))

    unclamped = torch.empty_like(middle)
    activation.silu_and_mul(unclamped, both)
    lost = margin(values(unclamped), activated(values(both), LIMIT))
    record(kind="numerics", format=form.name, cell="experts", margins=margins,
           margin=max(margins.values()), lost_clamp=lost, launches=2)  # fmt: skip
    assert max(margins.values()) <= 1, margins
    assert lost > 1
