"""The formats that are not llm-compressor's, read back by the libraries that know them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter

from tests.support.native_formats import DECODER_EXPERT, EXPERT, LINEAR, make_with_tools
from tests.support.variants import cached_variant
from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.codecs import grouped
from vllm_forge.checkpoints.fixtures.tiny import TinySpec
from vllm_forge.checkpoints.quantize.calibrate import load_tensor
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from vllm_forge.checkpoints.tensors import StoredTensor


@pytest.fixture(scope="module")
def made(root: Path) -> dict[str, Mapping[str, StoredTensor]]:
    project, spec = Project(root), TinySpec()
    return {
        name: Checkpoint.open(cached_variant(project, name, spec, make_with_tools)).tensors
        for name in (
            "bf16",
            "card",
            "nvidia-modelopt",
            "modelopt-fp8-mtp",
            "native-fp8-mxfp4",
            "dspark",
        )
    }


def test_compressed_tensors_reads_the_modelopt_layout_back(
    made: dict[str, dict[str, StoredTensor]],
) -> None:
    tensors = {
        name: load_tensor(t)
        for name, t in made["nvidia-modelopt"].items()
        if DECODER_EXPERT.search(name)
    }
    converter = ModelOptNvfp4Converter(targets=[r"re:.*\.experts\.\d+\.w[123]$"])
    back = converter.process(tensors)
    expected = {name: t for name, t in made["card"].items() if DECODER_EXPERT.search(name)}
    assert set(back) == set(expected)
    for name, tensor in expected.items():
        value = load_tensor(tensor)
        if name.endswith("global_scale"):  # twice inverted
            torch.testing.assert_close(back[name], value, rtol=2**-22, atol=0)
        else:
            assert torch.equal(back[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize(
    "name", ["native-fp8-mxfp4", "dspark", "nvidia-modelopt", "modelopt-fp8-mtp"]
)
def test_every_linear_layer_has_one_e8m0_scale(
    made: dict[str, dict[str, StoredTensor]], name: str
) -> None:
    tensors = made[name]
    scaled = {n for n in tensors if n.endswith(".scale")}
    linear = {n for n in tensors if LINEAR.search(n) or (EXPERT.search(n))}
    if "modelopt" in name:
        linear = {n for n in linear if not DECODER_EXPERT.search(n)}
    assert scaled == {f"{n.removesuffix('.weight')}.scale" for n in linear}
    assert {tensors[n].dtype for n in scaled} == {"F8_E8M0"}


def test_the_modelopt_layout_leaves_the_draft_in_the_native_formats(
    made: dict[str, dict[str, StoredTensor]],
) -> None:
    drafts = {n: t for n, t in made["nvidia-modelopt"].items() if n.startswith("mtp.")}
    native = {n: t for n, t in made["native-fp8-mxfp4"].items() if n.startswith("mtp.")}
    assert set(drafts) == set(native)
    for name, tensor in drafts.items():
        assert (tensor.dtype, tensor.read()) == (native[name].dtype, native[name].read()), name
    # As published: I8 codes (NVIDIA/TensorRT-LLM#16276), 797 + 768 + 10 tensors with 256 experts.
    assert drafts["mtp.0.ffn.experts.0.w1.weight"].dtype == "I8"
    assert len(drafts) + 2 * 3 * (256 - 8) == 1575


def test_fp8_blocks_dequantize_to_the_model(made: dict[str, dict[str, StoredTensor]]) -> None:
    """E4M3 has three bits of mantissa: 2^-4 of a normal value; below 2^-6 half of 2^-9."""
    tensors = made["native-fp8-mxfp4"]
    for name in (n for n in tensors if LINEAR.search(n)):
        scale = e8m0(tensors[f"{name.removesuffix('.weight')}.scale"])
        rows, columns = tensors[name].shape
        blocks = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        exact = load_tensor(made["bf16"][name]).double()
        error = (load_tensor(tensors[name]).double() * blocks - exact).abs()
        assert (error <= torch.maximum(exact.abs() * 2**-4, blocks * 2**-10)).all(), name


def test_mxfp4_experts_dequantize_to_the_model(made: dict[str, dict[str, StoredTensor]]) -> None:
    """Half of E2M1's widest step, between 4 and 6, is 1; what exceeds 6 saturates."""
    tensors = made["native-fp8-mxfp4"]
    for name in (n for n in tensors if DECODER_EXPERT.search(n) and n.endswith(".weight")):
        packed = load_tensor(tensors[name]).view(torch.uint8)
        codes = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2).double()
        groups = e8m0(tensors[f"{name.removesuffix('.weight')}.scale"]).repeat_interleave(32, 1)
        exact = load_tensor(made["bf16"][name]).double()
        clipped = exact.clamp(-6 * groups, 6 * groups)
        assert ((codes * groups - clipped).abs() <= groups).all(), name
        assert (exact.abs() <= 8 * groups).all(), name  # the scale is amax rounded to a power of 2


def test_int4_words_are_read_as_compressed_tensors_reads_them(
    variant: Callable[[str], Path],
) -> None:
    tensors = Checkpoint.open(variant("w4a16-fp8-mtp")).tensors
    for name in (n for n in tensors if n.endswith(".weight_packed")):
        packed = load_tensor(tensors[name])
        shape = torch.Size((packed.shape[0], packed.shape[1] * 8))
        theirs = unpack_from_int32(packed, 4, shape)
        ours = grouped.unpack_words(packed.numpy()).astype("i1") - 8
        assert torch.equal(theirs, torch.from_numpy(ours)), name


def e8m0(tensor: StoredTensor) -> torch.Tensor:
    """A scale's value: 2^(byte - 127)."""
    codes = torch.frombuffer(tensor.read(), dtype=torch.uint8).view(tensor.shape)
    return torch.exp2(codes.double() - 127)
