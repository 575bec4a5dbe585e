"""What a configuration and a built model say of themselves: one function a field of the answer."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from typing import Any

# Name of classes of experts that load and run by themselves, without a quantization method.
MEGA_MOE = "MegaMoEExperts"
RENDERED = ("deepseek_v4",)  # tokenizer modes whose template is code of vLLM
LAYER = re.compile(r"\.\d+\.")

Facts = dict[str, Any]


def attention_facts(config: Any) -> Facts | None:
    """The fields of the answer's attention; ``error`` where the backend rejects the device."""
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
        error += _flashmla_reason(layers)
    return {
        "chosen": ", ".join(sorted(backend.get_name() for backend in backends)),
        "kernel": ", ".join(sorted(kind.__name__ for kind in classes)),
        "error": error,
        "rejected": [],
    }


def _flashmla_reason(layers: list[Any]) -> str:
    ops = importlib.import_module("vllm.v1.attention.ops.flashmla")
    supported, reason = ops.is_flashmla_sparse_supported()
    used = any("FlashMLA" in layer.get_attn_backend().__name__ for layer in layers)
    return f": {reason}" if used and not supported else ""


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
    kernels = [kernel for kernel in map(block_kernel, modules) if kernel is not None]
    if not kernels:
        return None
    names = sorted({type(kernel).__name__ for kernel in kernels})
    return {
        "chosen": ", ".join(names),
        "kernel": None,
        "error": None,
        "rejected": _asked_before(kernels[0]),
    }


def block_kernel(module: Any) -> Any:
    """The kernel of an FP8-block linear layer, else None."""
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
    schemes: dict[str, Counter[str]] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None and type(module).__name__.endswith(MEGA_MOE):
            method = module
        if method is None or not name:
            continue
        scheme = getattr(module, "scheme", None)
        kind = type(scheme if scheme is not None else method).__name__
        schemes.setdefault(LAYER.sub(".*.", f"{name}."), Counter())[kind] += 1
    return {
        name.removesuffix("."): kinds.most_common(1)[0][0]
        if len(kinds) == 1
        else ", ".join(f"{kind} in {count}" for kind, count in sorted(kinds.items()))
        for name, kinds in sorted(schemes.items())
    }


def kv_facts(config: Any) -> list[Facts]:
    """Layers by the shape of their KV cache."""
    groups: Counter[tuple[str, int, int, int | None]] = Counter()
    for layer in attention_layers(config).values():
        spec = layer.get_kv_cache_spec(config)
        if spec is not None:
            window = getattr(spec, "sliding_window", None)
            groups[type(spec).__name__, spec.block_size, spec.page_size_bytes, window] += 1
    return [
        {"layers": count, "kind": kind, "block_size": size, "page_bytes": page, "window": window}
        for (kind, size, page, window), count in sorted(groups.items(), key=str)
    ]


def graph_facts(config: Any, model: Any) -> Facts:
    """The fields of the answer's cuda_graphs, as the model runner would resolve them."""
    compilation = config.compilation_config
    speculative = config.speculative_config
    query = 1 + (speculative.num_speculative_tokens if speculative is not None else 0)
    asked = compilation.cudagraph_mode
    mode = _resolve_mode(config, model, query)
    decode = _decode_sizes(config, mode, query)
    needed = config.scheduler_config.max_num_seqs * query
    return {
        "asked": getattr(asked, "name", "NONE"),
        "mode": mode.name,
        "piecewise": mode.has_piecewise_cudagraphs() and _captures_pieces(model),
        "sizes": decode,
        "capture_sizes": list(compilation.cudagraph_capture_sizes or []),
        "needed": needed,
        "covers": bool(decode) and decode[-1] >= needed,
    }


def _resolve_mode(config: Any, model: Any, query: int) -> Any:
    """v1/worker/gpu_model_runner.py, _check_and_update_cudagraph_mode; gpu/model_runner.py."""
    least, backend_name = None, None
    for layer in attention_layers(config).values():
        spec = layer.get_kv_cache_spec(config)
        if spec is None:
            continue
        backend = layer.get_attn_backend()
        support = backend.get_builder_cls().get_cudagraph_support(config, spec)
        if least is None or support.value < least.value:
            least, backend_name = support, backend.__name__
    resolve = config.compilation_config.resolve_cudagraph_mode_and_sizes
    arguments: Facts = {
        "min_cg_support": least,
        "min_cg_attn_backend": backend_name,
        "uniform_decode_query_len": query,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "use_v2_model_runner": config.use_v2_model_runner,
        "piecewise_capture_available": _captures_pieces(model),
    }
    known = inspect.signature(resolve).parameters
    return resolve(**{name: value for name, value in arguments.items() if name in known})


def _captures_pieces(model: Any) -> bool:
    """0.33.0, v1/worker/gpu/cudagraph_utils.py:141, has_compiled_submodule.

    Before it, model runner v1 keeps a piecewise mode for a model without pieces, whose mixed
    batches then run eager (0.26.0, v1/worker/gpu_model_runner.py:5394).
    """
    if importlib.import_module("vllm.envs").VLLM_USE_BREAKABLE_CUDAGRAPH:
        return True
    compiled = importlib.import_module("vllm.compilation.wrapper").TorchCompileWithNoGuardsWrapper
    return any(
        isinstance(module, compiled) and not getattr(module, "do_not_compile", True)
        for module in model.modules()
    )


def _decode_sizes(config: Any, mode: Any, query: int) -> list[int]:
    """Tokens of the graphs that hold decode batches: one request has ``query`` tokens."""
    if config.use_v2_model_runner:
        utils = importlib.import_module("vllm.v1.worker.gpu.cudagraph_utils")
        manager = utils.CudaGraphManager(config, None, mode, query)
        described = manager._capture_descs.get(mode.decode_mode(), [])
        return sorted({item.num_tokens for item in described})
    dispatcher = importlib.import_module("vllm.v1.cudagraph_dispatcher").CudagraphDispatcher(config)
    dispatcher.initialize_cudagraph_keys(mode, query)
    keys = dispatcher.cudagraph_keys.get(mode.decode_mode(), ())
    return sorted({key.num_tokens for key in keys if getattr(key, "uniform", True)})


def engine_facts(config: Any) -> Facts:
    """The fields of the answer's engine. Building the model sets some of them."""
    parallel, scheduler, cache = (
        config.parallel_config, config.scheduler_config, config.cache_config,
    )  # fmt: skip
    return {
        "tensor_parallel": parallel.tensor_parallel_size,
        "expert_parallel": bool(parallel.enable_expert_parallel),
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "gpu_memory_utilization": cache.gpu_memory_utilization,
        "kv_cache_dtype": str(cache.cache_dtype),
        "block_size": cache.block_size,
        "quantization": config.model_config.quantization,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "prefix_caching": bool(cache.enable_prefix_caching),
        "model_runner": "v2" if config.use_v2_model_runner else "v1",
    }


def chat_facts(config: Any) -> Facts | None:
    """How a chat is rendered that asks for nothing; None without a renderer for this model."""
    mode = config.model_config.tokenizer_mode
    if mode not in RENDERED:
        return None
    registry: Any = importlib.import_module("vllm.tokenizers.registry")
    tokenizer = registry.cached_tokenizer_from_config(config.model_config)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False)
    return {"tokenizer_mode": mode, "thinking": str(text).rstrip().endswith("<think>")}
