"""The tiny DeepSeek-V4 in the card's layout: patched it drafts, and without each patch it fails.

Which texts: what vLLM 0.26.0 raised on an H200 where a patch is left out.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.gpu.conftest import PARALLEL, Record
from tests.gpu.harness.bootlog import parse
from tests.gpu.mtp.conftest import DEEPSEEK, MARKS

if TYPE_CHECKING:
    from tests.gpu.mtp.engines import RanOf

pytestmark = [*MARKS, *DEEPSEEK]
RED = [
    ("dsv4-published", "has no attribute 'weight_scale"),
    ("dsv4-without-0002", "has no attribute 'weight_scale_inv'"),
    ("dsv4-without-0003", "has no attribute 'weight_scale'"),
    ("dsv4-weights-only-without-0001", "AssertionError"),
]


patched = pytest.mark.parametrize(
    "name",
    [
        pytest.param("dsv4", marks=pytest.mark.engines("dsv4")),
        pytest.param("dsv4-parallel", marks=[pytest.mark.engines("dsv4-parallel"), PARALLEL]),
    ],
)


@patched
def test_patched_loads_and_drafts(name: str, ran: RanOf, record: Record) -> None:
    found = ran(name)
    assert not found.error, found.error
    assert found.reading is not None
    assert all(len(tokens) == found.engine.count for tokens in found.tokens)
    # Random weights: how many drafts are taken is chance, that they are made is not.
    assert found.reading.drafts > 0
    assert found.reading.draft_tokens == found.engine.k * found.reading.drafts
    record(
        drafts=found.reading.drafts,
        accepted=found.reading.accepted,
        seconds=found.seconds,
        compiled_before=int(os.environ.get("VLLM_FORGE_COMPILED_FILES", "0")),
    )


@patched
def test_draft_block_is_bf16(name: str, ran: RanOf, record: Record) -> None:
    """The target's experts are FP4, the draft's are not: no parameter of it is quantized."""
    found = ran(name)
    record(dtypes=found.draft_dtypes)
    assert found.draft_dtypes.get("bfloat16", 0) > 0
    assert set(found.draft_dtypes) <= {"bfloat16", "float32", "int64", "int32"}
    config = parse(found.log)
    assert any(row.startswith("NvFp4: ") for row in config.moe)
    assert any(row.startswith("Unquantized: ") for row in config.moe)


@pytest.mark.parametrize(
    ("name", "error"), [pytest.param(*row, marks=pytest.mark.engines(row[0])) for row in RED]
)
def test_without_the_patch_it_fails(name: str, error: str, ran: RanOf) -> None:
    found = ran(name)
    assert not found.tokens
    assert error in found.error


@pytest.mark.engines("dsv4-weights-only")
def test_weights_only_group_answers(ran: RanOf) -> None:
    """The layout that patch 0001 is for: attention projections without input activations."""
    found = ran("dsv4-weights-only")
    assert not found.error, found.error
    assert all(len(tokens) == found.engine.count for tokens in found.tokens)


@pytest.mark.engines("dsv4-weights-only-wo-a")
def test_weights_only_wo_a_is_not_cured(ran: RanOf) -> None:
    """Repacked for weight-only kernels, wo_a is no operand of DeepGEMM's einsum; no patch helps.

    The series must not be praised for more than it does: such a checkpoint loads and then stops.
    """
    found = ran("dsv4-weights-only-wo-a")
    assert not found.tokens
    assert "fp8_einsum" in found.error
    assert "t.dim() == N" in found.error
