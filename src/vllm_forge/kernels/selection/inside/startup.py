"""What vLLM does after it loaded the weights and before it is ready, as far as no GPU is needed.

Its own code, in its order: the experts' check of the device, groups of the KV cache, block sizes
and metadata builders of the attention backends, also of the draft, and the scheduler. Kernels are
not run and memory is not measured: late_stops.toml lists what that leaves out.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import traceback
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .building import on_meta
from .facts import block_kernel
from .serving import Refusal, clean, explain, raised_in_vllm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .building import ModelBuild

# Bytes for the KV cache of a rank; so many that no context is too long: memory is judged elsewhere.
ENOUGH = 1 << 46
PLANS_GROUPS = "get_global_kv_cache_groups"
# The block pool has an object for each block.
FEW_BLOCKS = 64
DRAFT_LAYERS = "draft_layer_names"
DEEP_GEMM = "vllm.model_executor.kernels.linear.scaled_mm.deep_gemm"
SM120 = 120
SPARSE_SM120 = "flashinfer.mla._sparse_mla_sm120"


def check_startup(config: Any, build: ModelBuild) -> None:
    """Raise Refusal("start") where vLLM stops."""
    with refused_late(), on_meta(config.model_config.dtype):
        for model in (build.model, build.draft):
            if model is not None:
                _check_experts(model)
        cache = _kv_cache(config)
        prepare = _prepare_attention_v2 if config.use_v2_model_runner else _prepare_attention_v1
        _check_sparse_kernels(prepare(config, cache, build), build)
        _make_scheduler(config, cache)


def check_first_forward(build: ModelBuild) -> None:
    """Raise Refusal("start") where the output projection stops in the first forward pass.

    Attention takes the FP8 weight out of wo_a, for DeepGEMM's fp8_einsum. That stops at a weight
    with two dimensions, and only DeepGEMM's kernel of linear layers gives it three: deep_gemm.py,
    line 103 of 0.22.1 and 0.26.0, 97 of 0.33.0. VLLM_USE_DEEP_GEMM, VLLM_DISABLED_KERNELS,
    --linear-backend and --dtype change which kernel is taken.
    """
    wanted: Any = importlib.import_module(DEEP_GEMM).DeepGemmFp8BlockScaledMMKernel
    models = (model for model in (build.model, build.draft) if model is not None)
    for name, module in (item for model in models for item in model.named_modules()):
        kernel = block_kernel(module) if getattr(module, "is_bmm", False) else None
        if kernel is None or isinstance(getattr(kernel, "fallback", kernel), wanted):
            continue
        layer, taken = name.rpartition(".")[2], type(kernel).__name__
        what = f"{layer} needs the layout of {wanted.__name__}, and vLLM takes {taken}"
        raise Refusal("start", f"{what}: fp8_einsum stops at it in the first forward pass")


@contextlib.contextmanager
def refused_late() -> Iterator[None]:
    """What vLLM raises in the block, as Refusal("start") with the place in its source."""
    try:
        yield
    except Exception as error:
        if not raised_in_vllm(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename.partition('/site-packages/')[2]}:{frame.lineno}"
        if not str(error):  # an assert without a message
            place += f": {frame.line}"
        raise Refusal("start", clean(f"{explain(error)} ({place})")) from error


def _check_experts(model: Any) -> None:
    """MegaMoE experts look at the device when their weights are complete (finalize_weights)."""
    torch: Any = importlib.import_module("torch")
    for module in model.modules():
        check = getattr(type(module), "_check_runtime_supported", None)
        if check is not None:
            weight = SimpleNamespace(device=SimpleNamespace(type="cuda", index=0))
            stand_in = SimpleNamespace(**vars(module), w13_weight=weight)
            with torch._C.DisableTorchFunction():
                check(stand_in)


def _kv_cache(config: Any) -> Any:
    """v1/engine/core.py, _initialize_kv_caches, with memory for any context."""
    core: Any = importlib.import_module("vllm.v1.engine.core")
    if hasattr(core, "register_all_kvcache_specs"):
        core.register_all_kvcache_specs(config)
    specs = _kv_cache_specs(config)
    groups = _planned_groups(core, config, specs) if hasattr(core, PLANS_GROUPS) else []
    caches = core.get_kv_cache_configs(config, [specs], [ENOUGH], *groups)
    cache = core.generate_scheduler_kv_cache_config(caches)
    cache.num_blocks = config.cache_config.num_gpu_blocks = FEW_BLOCKS
    sizes = [
        group.kv_cache_spec.block_size
        for group in cache.kv_cache_groups
        if getattr(group.kv_cache_spec, "prefix_cacheable", True)
    ]
    config.cache_config.block_size = min(sizes)
    config.validate_block_size()
    return cache


def _planned_groups(core: Any, config: Any, specs: Any) -> list[Any]:
    """From 0.33.0 on, the layout of the cache and its groups come before memory is measured."""
    worker: Any = importlib.import_module("vllm.v1.worker.worker_base").WorkerBase
    layouts = worker.get_supported_kv_cache_layouts(SimpleNamespace(vllm_config=config))
    core.resolve_kv_cache_layout(config, [layouts], specs.values())
    groups = core.get_global_kv_cache_groups(config, [specs])
    config.adjust_dcp_kv_cache_interleave_size(groups)
    return [groups]


def _kv_cache_specs(config: Any) -> Any:
    if config.use_v2_model_runner:
        utils: Any = importlib.import_module("vllm.v1.worker.gpu.attn_utils")
        return utils.get_kv_cache_spec(config)
    runner: Any = importlib.import_module("vllm.v1.worker.gpu_model_runner")
    stand_in = SimpleNamespace(vllm_config=config, shared_kv_cache_layers={})
    return runner.GPUModelRunner.get_kv_cache_spec(stand_in)


def _prepare_attention_v2(config: Any, cache: Any, build: ModelBuild) -> Any:
    """v1/worker/gpu/model_runner.py, initialize_kv_cache; returns the groups of layers."""
    utils: Any = importlib.import_module("vllm.v1.worker.gpu.attn_utils")
    device = importlib.import_module("torch").device("meta")
    cp_utils: Any = importlib.import_module("vllm.v1.worker.cp_utils")
    names = {name for group in cache.kv_cache_groups for name in group.layer_names}
    if DRAFT_LAYERS not in inspect.signature(utils.init_attn_backend).parameters:  # 0.26.0
        groups, *_ = utils.init_attn_backend(cache, config, device)
        cp_utils.check_attention_cp_compatibility(config)
        return groups
    draft = {DRAFT_LAYERS: names & build.draft_layers} if build.draft is not None else {}
    groups, *_ = utils.init_attn_backend(cache, config, device, **draft)
    cp_utils.check_attention_cp_compatibility(config, names - build.draft_layers)
    return groups


def _prepare_attention_v1(config: Any, cache: Any, build: ModelBuild) -> Any:
    """v1/worker/gpu_model_runner.py, initialize_kv_cache; the graphs' mode is asked elsewhere."""
    runner: Any = importlib.import_module("vllm.v1.worker.gpu_model_runner")
    device = importlib.import_module("torch").device("meta")
    stand_in = SimpleNamespace(
        vllm_config=config,
        parallel_config=config.parallel_config,
        speculative_config=None,
        device=device,
        attn_groups=[],
        kv_sharing_fast_prefill_eligible_layers=set(),
        _check_and_update_cudagraph_mode=lambda *_args, **_kwargs: None,
        calculate_reorder_batch_threshold=lambda: None,
    )
    runner.GPUModelRunner.initialize_attn_backend(stand_in, cache)
    sizes = runner.prepare_kernel_block_sizes(cache, stand_in.attn_groups)
    runner.GPUModelRunner.initialize_metadata_builders(stand_in, cache, sizes)
    if build.draft is None:
        return stand_in.attn_groups
    proposer: Any = importlib.import_module("vllm.v1.spec_decode.llm_base_proposer")
    kind = proposer.SpecDecodeBaseProposer
    cached = {name for group in cache.kv_cache_groups for name in group.layer_names}
    draft = SimpleNamespace(
        vllm_config=config, device=device, _draft_attn_layer_names=cached & build.draft_layers
    )
    draft.validate_same_kv_cache_group = lambda cache: kind.validate_same_kv_cache_group(
        draft, cache
    )
    kind.initialize_attn_backend(draft, cache, sizes)
    return stand_in.attn_groups


def _check_sparse_kernels(groups: Any, build: ModelBuild) -> None:
    """A DSpark draft needs sparse decode kernels of its own width, which FlashInfer may lack.

    vLLM 0.33.0 asks in its constructor (nvidia/flashinfer_sparse.py:662). 0.26.0 is stopped by a
    check of the kernel's in its warmup, after loading: vllm#50720.
    """
    builders = (item for row in groups for group in row for item in group.metadata_builders)
    width = max((getattr(item, "noncausal_index_width", 0) for item in builders), default=0)
    platform: Any = importlib.import_module("vllm.platforms").current_platform
    if not width or not platform.is_device_capability_family(SM120):
        return
    kernels = importlib.import_module(SPARSE_SM120)._DECODE_DSV4_DISPATCH
    heads = {item.padded_heads for item in build.draft.modules() if hasattr(item, "padded_heads")}
    if missing := sorted(number for number in heads if (number, width) not in kernels):
        what = f"FlashInfer has no sparse decode kernel for {missing[0]} heads and {width} indices"
        raise Refusal("start", f"draft: {what} ({SPARSE_SM120}._DECODE_DSV4_DISPATCH)")


def _make_scheduler(config: Any, cache: Any) -> None:
    """v1/engine/core.py, __init__."""
    core: Any = importlib.import_module("vllm.v1.engine.core")
    scheduler, hashed = core.resolve_kv_cache_block_sizes(cache, config)
    if hasattr(core, "resolve_cache_hit_alignment_tokens"):
        cache.hash_block_size = hashed
        cache.cache_hit_alignment_tokens = core.resolve_cache_hit_alignment_tokens(
            cache, config, scheduler, hashed
        )
    kind = config.scheduler_config.get_scheduler_cls()
    kind(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=SimpleNamespace(),
        block_size=scheduler,
        hash_block_size=hashed,
    )
