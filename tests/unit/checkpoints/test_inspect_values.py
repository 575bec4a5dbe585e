"""Decoded weights of a checkpoint against its source: sound ones pass, planted faults are named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.support.layouts import NVFP4, compressed, profile_of
from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.codecs import fp8_block, nvfp4
from vllm_forge.checkpoints.fixtures.tiny import TinySpec, write_bf16
from vllm_forge.checkpoints.inspect.findings import Effect
from vllm_forge.checkpoints.inspect.profile import Format, Part
from vllm_forge.checkpoints.inspect.values import compare
from vllm_forge.checkpoints.quantize.inputs import alias_names, load_recipe
from vllm_forge.checkpoints.tensors import (
    TensorToWrite,
    copy_of,
    in_memory,
    write_index,
    write_shard,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vllm_forge.checkpoints.checkpoint import Checkpoint
    from vllm_forge.checkpoints.tensors import StoredTensor

Change = Callable[["TensorToWrite"], "TensorToWrite"]
SPEC = TinySpec(
    ratios=(0, 4), vocab=64, hidden=128, heads=2, q_rank=128, experts=2, expert_width=128
)
NAME = "model.safetensors"


def _values(tensor: StoredTensor) -> NDArray[np.float32]:
    wide = np.frombuffer(tensor.read(), "<u2").astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32).reshape(tensor.shape)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("values") / "bf16"
    write_bf16(folder, SPEC)
    return folder


def _quantized(source: Checkpoint, tensor: StoredTensor, *, shared: bool) -> list[TensorToWrite]:
    module = tensor.name.removesuffix(".weight")
    weight = _values(tensor)
    if ".experts." not in tensor.name:
        block = fp8_block.encode(weight)
        return [
            in_memory(tensor.name, "F8_E4M3", tensor.shape, block.codes.tobytes()),
            in_memory(f"{module}.weight_scale", "F32", block.scales.shape, block.scales.tobytes()),
        ]
    stem, _, projection = module.rpartition(".")
    pair = ("w1", "w3") if projection != "w2" else ("w2",)
    others = [_values(source.tensors[f"{stem}.{name}.weight"]) for name in pair]
    scale = nvfp4.global_scale_of(*others)
    if not shared and projection == "w3":
        scale = scale / np.float32(4)
    made = nvfp4.encode(weight, scale)
    rows = (
        ("weight_packed", "U8", made.packed),
        ("weight_scale", "F8_E4M3", made.scales),
        ("weight_global_scale", "F32", np.array(scale)),
        ("input_global_scale", "F32", np.array(scale)),
    )
    return [in_memory(f"{module}.{leaf}", d, a.shape, a.tobytes()) for leaf, d, a in rows]


@pytest.fixture
def made(source: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes an artifact of the source by our own codecs; ``change`` maps an item to another."""
    checkpoint = Checkpoint.open(source)
    recipe = load_recipe("nvfp4-fp8-mtp")

    def write(
        change: Callable[[TensorToWrite], TensorToWrite] = lambda item: item, *, shared: bool = True
    ) -> Path:
        folder = tmp_path / "made"
        folder.mkdir()
        items: list[TensorToWrite] = []
        for tensor in checkpoint.tensors.values():
            if recipe.group_of(tensor.name) is not None:
                items += _quantized(checkpoint, tensor, shared=shared)
            else:
                items.append(copy_of(tensor))
        for alias, name in alias_names(checkpoint).items():
            items.append(copy_of(checkpoint.tensors[name], alias))
        changed = [change(item) for item in items]
        write_shard(folder / NAME, changed)
        write_index(folder, {NAME: changed})
        config = {**checkpoint.config, "quantization_config": compressed(NVFP4, layers=2)}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def test_a_sound_artifact_is_within_its_bounds(made: Callable[..., Path], source: Path) -> None:
    rows, found = compare(profile_of(made()), profile_of(source))
    assert found == []
    told = {(row.part, row.draft, row.format): row for row in rows}
    experts = told[Part.EXPERTS, False, Format.NVFP4]
    assert experts.weights == 2 * 2 * 3
    assert experts.worst is not None
    assert 0.8 < experts.worst <= 1
    attention = told[Part.ATTENTION, False, Format.FP8_BLOCK]
    assert attention.weights == 2 * 5
    assert sum(row.weights for row in rows if row.draft) == 3 * 2 + 29 + 2  # experts, rest, aliases


def test_codes_of_a_dtype_that_vllm_converts_are_compared(
    made: Callable[..., Path], source: Path
) -> None:
    def signed(item: TensorToWrite) -> TensorToWrite:
        return replace(item, dtype="I8") if item.name.endswith("weight_packed") else item

    assert compare(profile_of(made(signed)), profile_of(source), most=2)[1] == []


def test_a_sample_is_spread(made: Callable[..., Path], source: Path) -> None:
    rows, _ = compare(profile_of(made()), profile_of(source), most=2)
    assert {row.weights for row in rows} <= {1, 2}


def _on(
    ending: str, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
) -> Callable[[TensorToWrite], TensorToWrite]:
    def apply(item: TensorToWrite) -> TensorToWrite:
        if not item.name.endswith(ending):
            return item
        data = np.frombuffer(b"".join(item.chunks()), np.uint8)
        return in_memory(item.name, item.dtype, item.shape, change(data).tobytes())

    return apply


def _inverted(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return (1 / data.view("<f4")).astype("<f4").view(np.uint8)


FAULTS = {
    "swapped-nibbles": _on("0.w2.weight_packed", lambda b: (b << np.uint8(4)) | (b >> np.uint8(4))),
    "inverted-global-scale": _on("1.w2.weight_global_scale", _inverted),
    "zero-global-scale": _on("1.w2.weight_global_scale", np.zeros_like),
    "dropped-block-scale": _on("1.w1.weight_scale", lambda b: np.full_like(b, 0x38)),
    "nan-block-scale": _on("1.w1.weight_scale", lambda b: np.full_like(b, 0x7F)),
    "rolled-fp8-codes": _on("layers.0.attn.wo_b.weight", lambda b: np.roll(b, 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, made: Callable[..., Path], source: Path) -> None:
    rows, found = compare(profile_of(made(FAULTS[fault])), profile_of(source))
    assert {f.effect for f in found} == {Effect.CORRUPTS}
    assert len(found) == 1
    assert all(row.worst is not None and row.worst > 1 for row in rows if row.different)


def test_global_scales_of_their_own_are_named(made: Callable[..., Path], source: Path) -> None:
    """As vLLM reads them: w3 under w1's. Each by its own would be right."""
    rows, found = compare(profile_of(made(shared=False)), profile_of(source))
    different = {name for row in rows for name in row.different}
    assert all(name.endswith(".w3") for name in different)
    assert len(different) == 2 * 2
    assert [f.effect for f in found] == [Effect.CORRUPTS]


def test_one_other_byte_of_the_draft_is_named(made: Callable[..., Path], source: Path) -> None:
    def flip(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        changed = data.copy()
        changed[-1] ^= 1
        return changed

    _, found = compare(profile_of(made(_on("mtp.0.e_proj.weight", flip))), profile_of(source))
    assert [(f.effect, f.scope) for f in found] == [(Effect.DEPARTS, "draft")]
    assert "mtp.0.e_proj.weight" in found[0].what


def test_a_source_that_lacks_a_tensor_is_left_out(made: Callable[..., Path], source: Path) -> None:
    profile = profile_of(made())
    other = profile_of(source)
    rows, _ = compare(profile, other)
    count = sum(row.weights for row in rows)
    assert count == sum(
        1
        for n in profile.tensors
        if math.prod(profile.tensors[n].shape)
        and (
            n.rpartition(".")[2]
            not in {"weight_scale", "weight_global_scale", "input_global_scale"}
        )
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda i: in_memory(i.name, i.dtype, (2, i.size // 2), b"".join(i.chunks())),
        lambda i: in_memory(i.name, "I8", i.shape, b"".join(i.chunks())),
        lambda i: in_memory(f"{i.name}_inv", i.dtype, i.shape, b"".join(i.chunks())),
    ],
    ids=["another shape", "another dtype", "another name"],
)
def test_what_cannot_be_decoded_is_beyond_any_bound(
    change: Callable[[TensorToWrite], TensorToWrite], made: Callable[..., Path], source: Path
) -> None:
    """Of w1, with whose global scale w3 is decoded; w2 is not concerned."""
    wanted = "layers.0.ffn.experts.1.w1.weight_scale"
    folder = made(lambda item: change(item) if item.name == wanted else item)
    rows, found = compare(profile_of(folder), profile_of(source))
    assert [finding.effect for finding in found] == [Effect.CORRUPTS]
    different = {name for row in rows for name in row.different}
    assert different == {f"layers.0.ffn.experts.1.{name}" for name in ("w1", "w3")}
    assert {row.worst for row in rows if row.different} == {math.inf}


def test_a_source_that_is_quantized_bounds_nothing(made: Callable[..., Path]) -> None:
    """Against itself: plain tensors are alike, and no bound follows from codes."""
    folder = made()
    rows, found = compare(profile_of(folder), profile_of(folder))
    attention = next(row for row in rows if row.format is Format.FP8_BLOCK)
    assert attention.worst == math.inf
    assert found
