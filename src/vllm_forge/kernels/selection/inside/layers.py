"""Attention, linear kernels and quantization schemes of a built model."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from typing import Any

LAYER = re.compile(r"\.\d+\.")

Facts = dict[str, Any]


def attention_facts(config: Any) -> Facts | None:
    """The fields of the model's Choice, and what the backend says of the device."""
    capability = importlib.import_module("vllm.platforms").current_platform.get_device_capability()
    layers = [layer for name, layer in attention_layers(config).items() if name.endswith(".attn")]
    if not layers:
        return None
    backends = {layer.get_attn_backend() for layer in layers}
    classes = {getattr(layer, "impl_cls", None) or type(layer) for layer in layers}
    unsupported = [b for b in backends if not b.supports_compute_capability(capability)]
    error = None
    if unsupported:
        names = ", ".join(sorted(b.__name__ for b in unsupported))
        error = f"{names} does not support compute capability {capability.as_version_str()}"
        error += _flashmla_says(layers)
    return {
        "chosen": ", ".join(sorted(backend.get_name() for backend in backends)),
        "kernel": ", ".join(sorted(kind.__name__ for kind in classes)),
        "error": error,
        "rejected": [],
    }


def _flashmla_says(layers: list[Any]) -> str:
    ops = importlib.import_module("vllm.v1.attention.ops.flashmla")
    supported, reason = ops.is_flashmla_sparse_supported()
    mine = any("FlashMLA" in layer.get_attn_backend().__name__ for layer in layers)
    return f": {reason}" if mine and not supported else ""


def attention_layers(config: Any) -> Facts:
    """Every layer with a KV cache or an attention backend, also the draft's."""
    base = importlib.import_module("vllm.model_executor.layers.attention_layer_base")
    context = config.compilation_config.static_forward_context
    return {k: v for k, v in context.items() if isinstance(v, base.AttentionLayerBase)}


def linear_facts(config: Any, model: Any) -> Facts | None:
    """The kernel of the FP8-block linear layers, and the kernels asked before it."""
    torch = importlib.import_module("torch")
    if model is not None:
        modules = list(model.modules())
    else:  # what was built before the refusal
        layers = config.compilation_config.static_forward_context.values()
        modules = [
            m for layer in layers if isinstance(layer, torch.nn.Module) for m in layer.modules()
        ]
    kernels = [kernel for kernel in map(_block_kernel, modules) if kernel is not None]
    if not kernels:
        return None
    names = sorted({type(kernel).__name__ for kernel in kernels})
    return {
        "chosen": ", ".join(names),
        "kernel": None,
        "error": None,
        "rejected": _asked_before(kernels[0]),
    }


def _block_kernel(module: Any) -> Any:
    for owner in (getattr(module, "scheme", None), getattr(module, "quant_method", None)):
        kernel = getattr(owner, "fp8_linear", None)
        if kernel is not None:
            return kernel
    return None


def _asked_before(kernel: Any) -> list[Facts]:
    package = importlib.import_module("vllm.model_executor.kernels.linear")
    platforms = importlib.import_module("vllm.platforms")
    rows = []
    for candidate in package._POSSIBLE_FP8_BLOCK_KERNELS[platforms.PlatformEnum.CUDA]:
        if candidate is type(kernel):
            break
        ok, why = package.is_supported_and_can_implement_kernel(candidate, kernel.config, None)
        reason = "" if ok else str(why).strip().removeprefix(candidate.__name__).strip()
        rows.append({"candidate": candidate.__name__, "reason": reason or "passed over"})
    return rows


def module_schemes(model: Any) -> dict[str, str]:
    """Module name, with ``*`` for the layer's number, to its quantization scheme."""
    found: dict[str, Counter[str]] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or not name:
            continue
        scheme = getattr(module, "scheme", None)
        kind = type(scheme if scheme is not None else method).__name__
        found.setdefault(LAYER.sub(".*.", f"{name}."), Counter())[kind] += 1
    return {
        name.removesuffix("."): kinds.most_common(1)[0][0]
        if len(kinds) == 1
        else ", ".join(f"{kind} in {count}" for kind, count in sorted(kinds.items()))
        for name, kinds in sorted(found.items())
    }
