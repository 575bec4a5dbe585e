"""Formats that are not llm-compressor's: DeepSeek's own FP8 and MXFP4, and NVIDIA's ModelOpt.

Codes and scales are computed by llm-compressor's and compressed-tensors' functions for weights
(llmcompressor 0.14.0.1, entrypoints/model_free/lifecycle.py); here they only get other names. For
tiny fixtures: nothing here is calibrated, and all of a file is in memory.

Needs the environment of docker/locks/quantize.txt.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.compressors.base import compress_module
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor.entrypoints.model_free.lifecycle import (
    calibrate_weight,
    initialize_quantized_linear,
)

from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.quantize.changes import write_derived
from vllm_forge.checkpoints.quantize.one_layer import load_tensor, tensor_bytes
from vllm_forge.checkpoints.tensors import StoredTensor, TensorToWrite, copy_of, in_memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What DeepSeek publishes in FP8: every linear layer but the compressors', the router's, the heads'
# (vLLM 0.26.0, models/deepseek_v4: which layers get a quant_config).
LINEAR = re.compile(
    r"^(layers|mtp)\.\d+\.("
    r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123]|[eh]_proj|main_proj"
    r")\.weight$"
)
EXPERT = re.compile(r"\.ffn\.experts\.\d+\.w[123]\.weight$")
DECODER_EXPERT = re.compile(r"^layers\.\d+\.ffn\.experts\.\d+\.w[123]\.")
COMPRESSOR = re.compile(r"^layers\.\d+\.attn\.(indexer\.)?compressor\.(wkv|wgate)\.weight$")
NATIVE_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
# nvidia/DeepSeek-V4-Flash-NVFP4: the native config and these (vllm-project/recipes#541 and
# hf_quant_config.json as published; quantized_layers are the decoder layers' experts).
MODELOPT_CONFIG = NATIVE_CONFIG | {
    "quant_algo": "MIXED_PRECISION",
    "moe_quant_algo": "NVFP4",
    "group_size": 16,
    "kv_cache_quant_algo": None,
    "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
}
# compressed-tensors' name -> ModelOpt's; the F32 scales are each other's inverse.
MODELOPT_NAMES = {
    "weight_packed": "weight",
    "weight_scale": "weight_scale",
    "weight_global_scale": "weight_scale_2",
    "input_global_scale": "input_scale",
}


def write_native(source: Checkpoint, folder: Path) -> None:
    """FP8 linear layers, MXFP4 experts, the MTP or DSpark blocks like the decoder's."""

    def convert(tensor: StoredTensor) -> list[TensorToWrite]:
        if EXPERT.search(tensor.name):
            return _mxfp4(tensor)
        return _fp8(tensor, "scale") if LINEAR.search(tensor.name) else [copy_of(tensor)]

    _write(source, folder, convert, _native_config(source, NATIVE_CONFIG))


def write_modelopt(
    source: Checkpoint, card: Checkpoint, folder: Path, *, fp8_drafts: bool = False
) -> None:
    """NVFP4 experts of ``card`` under ModelOpt's names; all else as DeepSeek publishes it.

    What its config excludes stays in the format of the source, the MTP block's experts in MXFP4
    (vLLM 0.33.0, models/deepseek_v41/quant_config.py `from_config`; seen in a published artifact:
    NVIDIA/TensorRT-LLM#16196).

    Args:
        source: the BF16 model.
        card: the card's variant of it.
        folder: appears when everything is in it.
        fp8_drafts: put those experts in FP8 blocks instead, as descriptions of it say.
    """

    def convert(tensor: StoredTensor) -> list[TensorToWrite]:
        if DECODER_EXPERT.search(tensor.name):
            module = tensor.name.removesuffix(".weight")
            return [
                _modelopt(card.tensors[f"{module}.{leaf}"], f"{module}.{name}")
                for leaf, name in MODELOPT_NAMES.items()
            ]
        if EXPERT.search(tensor.name):
            return _fp8(tensor, "scale") if fp8_drafts else _mxfp4(tensor)
        return _fp8(tensor, "scale") if LINEAR.search(tensor.name) else [copy_of(tensor)]

    layers = range(source.config["num_hidden_layers"])
    told = {f"layers.{n}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for n in layers}
    config = MODELOPT_CONFIG | {"quantized_layers": told}
    _write(source, folder, convert, _native_config(source, config))


def write_fp8(card: Checkpoint, folder: Path, kind: str) -> None:
    """``card`` with more in FP8 than its config says: its MTP block, or its compressors."""

    def convert(tensor: StoredTensor) -> list[TensorToWrite]:
        name = tensor.name
        if kind == "fp8-mtp":
            chosen = name.startswith("mtp.") and (LINEAR.search(name) or EXPERT.search(name))
        else:
            chosen = COMPRESSOR.search(name)
        return _fp8(tensor, "weight_scale") if chosen else [copy_of(tensor)]

    _write(card, folder, convert, card.config)


def _native_config(source: Checkpoint, quantization: dict[str, Any]) -> dict[str, Any]:
    return {**source.config, "expert_dtype": "fp4", "quantization_config": quantization}


def _write(
    source: Checkpoint,
    folder: Path,
    convert: Callable[[StoredTensor], list[TensorToWrite]],
    config: dict[str, Any],
) -> None:
    files: dict[str, list[TensorToWrite]] = {}
    for tensor in source.tensors.values():
        files.setdefault(tensor.shard, []).extend(convert(tensor))
    write_derived(source, folder, files, config)


def _quantized(tensor: StoredTensor, preset: str, form: str) -> torch.nn.Module:
    """A linear layer with the weight and its calibrated scale, not yet compressed."""
    scheme = preset_name_to_scheme(preset, ["Linear"]).model_copy(update={"format": form})
    module = initialize_quantized_linear(load_tensor(tensor), scheme, "cpu")
    calibrate_weight(module)
    return module


def _fp8(tensor: StoredTensor, leaf: str) -> list[TensorToWrite]:
    """Blocks of 128 x 128 with scales that are powers of two: E8M0, or F32 with the same values."""
    module = _quantized(tensor, "FP8_BLOCK", "float-quantized")
    exponents = torch.ceil(torch.log2(module.weight_scale.float()))
    module.weight_scale.data = torch.exp2(exponents).to(module.weight_scale.dtype)
    compress_module(module)
    name, shape = tensor.name.removesuffix(".weight"), tuple(exponents.shape)
    if leaf == "scale":
        codes = (exponents + 127).to(torch.uint8)
        scale = in_memory(f"{name}.scale", "F8_E8M0", shape, tensor_bytes(codes))
    else:
        values = tensor_bytes(module.weight_scale.float())
        scale = in_memory(f"{name}.{leaf}", "F32", shape, values)
    weight = in_memory(tensor.name, "F8_E4M3", tensor.shape, tensor_bytes(module.weight))
    return [weight, scale]


def _mxfp4(tensor: StoredTensor) -> list[TensorToWrite]:
    """Two codes per byte, one E8M0 scale per 32 columns."""
    module = _quantized(tensor, "MXFP4A16", "mxfp4-pack-quantized")
    compress_module(module)
    packed, scale = module.weight_packed, module.weight_scale
    name = tensor.name.removesuffix(".weight")
    return [
        in_memory(tensor.name, "I8", tuple(packed.shape), tensor_bytes(packed)),
        in_memory(f"{name}.scale", "F8_E8M0", tuple(scale.shape), tensor_bytes(scale)),
    ]


def _modelopt(tensor: StoredTensor, name: str) -> TensorToWrite:
    if tensor.dtype != "F32":
        return copy_of(tensor, name)
    return in_memory(name, "F32", tensor.shape, tensor_bytes(1 / load_tensor(tensor)))
