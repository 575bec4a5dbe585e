"""Layers of DeepSeek-V4 as the line's vLLM builds them, with weights of our own.

One rank, without process groups: shapes are a rank's shapes. The quantization scheme is found from
a configuration like the card's, the kernel by vLLM's own selection, and the weights go the way of
a checkpoint: parameters, then ``process_weights_after_loading``.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.gpu.reference.fp8_linear import BLACKWELL, HOPPER, Accumulator
from tests.gpu.reference.marlin_layout import bfloat16
from vllm_forge.checkpoints.codecs import fp8_block

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from numpy.typing import NDArray

    from tests.gpu.reference.marlin_weights import Weights
    from tests.gpu.reference.nvfp4_moe import Experts
    from tests.gpu.reference.nvfp4_moe_cells import Cell
    from vllm_forge.checkpoints.codecs.fp8_block import Fp8Block

DRAFT_LAYER = 43  # its modules are not quantized
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "format": "float-quantized",
            "targets": ["re:.*\\.attn\\.(fused_wqa_wkv|wq_b|wo_a|wo_b)$"],
            "weights": {
                "num_bits": 8, "type": "float", "strategy": "block", "symmetric": True,
                "dynamic": False, "block_structure": [128, 128],
            },
            "input_activations": {
                "num_bits": 8, "type": "float", "strategy": "group", "symmetric": True,
                "dynamic": True, "group_size": 128,
            },
        },
        "group_1": {
            "format": "nvfp4-pack-quantized",
            "targets": [
                "re:.*\\.ffn\\.experts\\.\\d+\\.(w1|w2|w3|gate_proj|up_proj|down_proj)$",
                "re:.*\\.ffn\\.shared_experts\\.(gate_up_proj|down_proj)$",
            ],
            "weights": {
                "num_bits": 4, "type": "float", "strategy": "tensor_group", "symmetric": True,
                "dynamic": False, "group_size": 16,
            },
            "input_activations": {
                "num_bits": 4, "type": "float", "strategy": "tensor_group", "symmetric": True,
                "dynamic": "local", "group_size": 16,
            },
        },
    },
    "ignore": [f"re:.*\\.layers\\.{DRAFT_LAYER}\\..*"],
    "scale_fmt": "ue8m0",
}  # fmt: skip


@cache
def _config() -> Any:
    from vllm.config import VllmConfig

    config = VllmConfig()
    # All that layers ask of the model: kernels compare its dtype, DeepGEMM knows models to avoid.
    config.model_config = SimpleNamespace(
        dtype=_torch().bfloat16, hf_text_config=SimpleNamespace(model_type="deepseek_v4")
    )
    # As for a model with block scales (config/vllm.py of 0.26.0).
    config.compilation_config.custom_ops.append("+quant_fp8")
    return config


def _torch() -> Any:
    import torch

    return torch


@contextmanager
def _building() -> Iterator[Any]:
    """As the model loader builds, with its configuration and dtype; gives the quantization's."""
    import vllm.distributed.parallel_state as state
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
    from vllm.utils.torch_utils import set_default_torch_dtype

    torch, config = _torch(), _config()
    config.compilation_config.static_forward_context.clear()  # of layers that are gone
    if state._TP is None:
        state._TP = SimpleNamespace(world_size=1, rank_in_group=0)
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        yield compressed_tensors.CompressedTensorsConfig.from_config(QUANTIZATION)


def experts_layer(experts: Experts, top_k: int, *, device: str = "cuda") -> Any:
    """A layer of routed experts: ``RoutedExperts`` of vLLM, ready to run.

    Args:
        experts: weights; their ``limit`` is the layer's ``swiglu_limit``.
        top_k: experts of a token.
        device: where it is built; not run anywhere but on "cuda".
    """
    from vllm.model_executor.layers.fused_moe import FusedMoE

    torch = _torch()
    with _building() as quantization:
        with torch.device(device):
            runner = FusedMoE(
                num_experts=experts.down.experts,
                top_k=top_k,
                hidden_size=experts.down.size_n,
                intermediate_size=experts.down.size_k,
                params_dtype=torch.bfloat16,
                quant_config=quantization,
                tp_size=1,
                dp_size=1,
                pcp_size=1,
                prefix="model.layers.0.ffn.experts",
                # The router is not run, but some kernels are only for some routers.
                scoring_func="sqrtsoftplus",
                e_score_correction_bias=torch.zeros(experts.down.experts, dtype=torch.float32),
                router_logits_dtype=torch.float32,
                swiglu_limit=experts.limit,
            )
        layer: Any = runner.routed_experts
        put(layer, experts.checkpoint())
        if device == "cuda":
            layer.quant_method.process_weights_after_loading(layer)
    return layer


def run_experts(layer: Any, cell: Cell) -> NDArray[np.float64]:
    """A launch through the layer's modular kernel, as the runner does it after the router."""
    from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

    torch = _torch()
    if not is_workspace_manager_initialized():
        init_workspace_manager(torch.device("cuda"))
    with torch.inference_mode():
        out = layer.forward_modular(
            bfloat16_tensor(cell.rows),
            torch.from_numpy(cell.router).cuda(),
            torch.from_numpy(cell.experts_of).cuda(),
        )
    return values(out)


def launch(cell: Cell, backend: str) -> NDArray[np.float64]:
    """What a new layer gives for a cell; this backend must be the one that vLLM selects."""
    layer = experts_layer(cell.experts, cell.experts_of.shape[1])
    assert layer.quant_method.nvfp4_backend.value == backend
    return run_experts(layer, cell)


def linear(
    weight: Fp8Block | NDArray[np.float64],
    *,
    name: str,
    groups: int | None = None,
    device: str = "cuda",
) -> Any:
    """A linear layer of attention, ready to run.

    Args:
        weight: FP8 with block scales; or bfloat16 values, [N, K], as a draft block has them.
        name: as in ``DeepseekV4Attention``.
        groups: of ``wo_a``, whose rows belong to as many matrices.
        device: where it is built; its weights are processed on "cuda" only.
    """
    plain = isinstance(weight, np.ndarray)
    shape = weight.shape if isinstance(weight, np.ndarray) else weight.codes.shape
    prefix = f"model.layers.{DRAFT_LAYER if plain else 0}.attn.{name}"
    with _linear(shape, prefix, device) as layer:
        if groups is not None:
            layer.is_bmm, layer.bmm_batch_size = True, groups
        if isinstance(weight, np.ndarray):
            layer.weight.data.copy_(bfloat16_tensor(weight, device))
        else:
            put(layer, {"weight": weight.codes, "weight_scale": weight.scales})
    return layer


@contextmanager
def _linear(shape: tuple[int, ...], prefix: str, device: str) -> Iterator[Any]:
    """A linear layer, [N, K], whose weights are processed after the caller has put them."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    rows, columns = shape
    with _building() as quantization:
        with _torch().device(device):
            layer: Any = ReplicatedLinear(
                columns, rows, bias=False, quant_config=quantization, prefix=prefix,
                return_bias=False, disable_tp=True,
            )  # fmt: skip
        yield layer
        if device == "cuda":
            layer.quant_method.process_weights_after_loading(layer)


def nvfp4_linear(weights: Weights, divisor: float, *, device: str = "cuda") -> Any:
    """A linear layer of shared experts in NVFP4, ready to run; see :func:`linear`.

    Args:
        weights: (1, K, N) with a multiplier.
        divisor: global scale of the activations, where the kernel quantizes them.
        device: where it is built.
    """
    from vllm_forge.checkpoints.codecs.nvfp4 import pack

    if weights.multiplier is None:
        raise ValueError("NVFP4 has a multiplier")
    prefix = "model.layers.0.ffn.shared_experts.down_proj"
    with _linear((weights.size_n, weights.size_k), prefix, device) as layer:
        tensors = {
            "weight_packed": pack(weights.codes[0].T),
            "weight_scale": weights.scales[0].astype(np.uint8).T,
            "weight_global_scale": np.float32(1) / weights.multiplier,
            "input_global_scale": np.array([divisor], np.float32),
        }
        put(layer, tensors)
    return layer


def run_linear(layer: Any, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """[M, K] to [M, N], through the layer."""
    with _torch().inference_mode():
        return values(layer(bfloat16_tensor(rows)))


def put(layer: Any, tensors: dict[str, NDArray[Any]]) -> None:
    """Fill parameters; bytes are taken as the codes of the parameter's dtype."""
    torch = _torch()
    for name, array in tensors.items():
        parameter = getattr(layer, name)
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if tensor.dtype == torch.uint8 and parameter.dtype != torch.uint8:
            tensor = tensor.view(parameter.dtype)
        if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
            raise ValueError(
                f"{name} is {parameter.dtype} {tuple(parameter.shape)}, "
                f"not {tensor.dtype} {tuple(tensor.shape)}"
            )
        parameter.data.copy_(tensor)


def bfloat16_tensor(rows: NDArray[np.float64], device: str = "cuda") -> torch.Tensor:
    """Values that are bfloat16 already, as a tensor of it."""
    torch = _torch()
    found: Any = torch.from_numpy(rows.astype(np.float32)).to(device, torch.bfloat16)
    return found


def values(tensor: torch.Tensor) -> NDArray[np.float64]:
    """A tensor as float64 in the host's memory."""
    found: NDArray[np.float64] = tensor.double().cpu().numpy()
    return found


def codes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor of a type of one byte."""
    found: NDArray[np.uint8] = tensor.contiguous().view(_torch().uint8).cpu().numpy()
    return found


def capability() -> tuple[int, int]:
    """The GPU's compute capability."""
    major, minor = _torch().cuda.get_device_capability(0)
    return int(major), int(minor)


def accumulator() -> Accumulator:
    """How this GPU adds products of FP8."""
    return HOPPER if capability() == (9, 0) else BLACKWELL


def random_rows(tokens: int, size: int) -> NDArray[np.float64]:
    """Bfloat16 values, [tokens, size]."""
    rng = np.random.default_rng(tokens)
    return bfloat16(rng.standard_normal((tokens, size)).astype(np.float32))


def fp8_weight(
    shape: tuple[int, int], seed: int, divisor: int, *, powers_of_two: bool = False
) -> Fp8Block:
    """Blocks that differ in size by up to 4."""
    rng = np.random.default_rng(seed)
    blocks = rng.uniform(0.5, 2, tuple(size // fp8_block.BLOCK for size in shape))
    source = rng.standard_normal(shape) * fp8_block.spread(blocks, shape) / divisor
    return fp8_block.encode(source, powers_of_two=powers_of_two)
