"""KV cache and CUDA graphs, as the model runner would resolve them."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from typing import Any

from .layers import attention_layers

Facts = dict[str, Any]


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
    """The fields of the model's CudaGraphs, as the model runner would resolve them."""
    compilation = config.compilation_config
    speculative = config.speculative_config
    query = 1 + (speculative.num_speculative_tokens if speculative is not None else 0)
    mode = _resolve_mode(config, model, query)
    decode = _decode_sizes(config, mode, query)
    needed = config.scheduler_config.max_num_seqs * query
    return {
        "mode": mode.name,
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
    given: Facts = {
        "min_cg_support": least,
        "min_cg_attn_backend": backend_name,
        "uniform_decode_query_len": query,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "use_v2_model_runner": config.use_v2_model_runner,
        "piecewise_capture_available": _captures_pieces(model),
    }
    known = inspect.signature(resolve).parameters
    return resolve(**{name: value for name, value in given.items() if name in known})


def _captures_pieces(model: Any) -> bool:
    if importlib.import_module("vllm.envs").VLLM_USE_BREAKABLE_CUDAGRAPH:
        return True
    utils = importlib.import_module("vllm.v1.worker.gpu.cudagraph_utils")
    has_compiled = getattr(utils, "has_compiled_submodule", None)
    return bool(has_compiled is None or has_compiled(model))


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
