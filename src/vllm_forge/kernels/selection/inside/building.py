"""Build vLLM's own model and draft model, by their constructors, on the meta device.

Constructors are where DeepSeek V4 chooses: the attention class, the MoE backend of every layer,
the scheme and kernel of every linear layer. On the meta device they need no memory and no GPU.
One rank of a tensor parallel group is built; the others are only counted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from .serving import Refusal, explain, forget_once, raised_in_vllm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .serving import Log

ATTENTION_LAYER = "vllm.model_executor.layers.attention_layer_base"
SELECTORS = ("select_", "_moe_backend")


@dataclass(kw_only=True)
class SelectionCall:
    """A call of a ``select_*_moe_backend`` of vLLM: arguments, log lines and result or error."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    lines: list[tuple[int, str]] = field(default_factory=list)
    result: tuple[Any, Any] | None = None
    error: str | None = None


@dataclass(kw_only=True)
class ModelBuild:
    """The models; ``refusal`` says why one of them is missing."""

    model: Any = None
    draft: Any = None
    draft_layers: frozenset[str] = frozenset()  # names of its layers with attention or a KV cache
    selections: list[SelectionCall] = field(default_factory=list)
    draft_selections: list[SelectionCall] = field(default_factory=list)
    refusal: Refusal | None = None


def build_models(config: Any, log: Log) -> ModelBuild:
    """The model and, where speculation is on, the draft model of a VllmConfig."""
    _use_groups(config)
    build = ModelBuild()
    with _recorded(log) as calls, on_meta(config.model_config.dtype):
        loader: Any = importlib.import_module("vllm.model_executor.model_loader.utils")
        loader.record_metadata_for_reloading = lambda _model: None  # takes long, selects nothing
        try:
            try:
                build.model = loader.initialize_model(vllm_config=config)
            finally:
                build.selections, calls[:] = [*calls], []
            if config.speculative_config is not None:
                forget_once()
                layers = config.compilation_config.static_forward_context
                before = set(layers)
                build.draft = loader.initialize_model(
                    vllm_config=_draft_config(config),
                    model_config=config.speculative_config.draft_model_config,
                )
                base: Any = importlib.import_module(ATTENTION_LAYER)
                build.draft_layers = frozenset(
                    name
                    for name in layers.keys() - before
                    if isinstance(layers[name], base.AttentionLayerBase)
                )
        except Exception as error:
            if not raised_in_vllm(error):
                raise
            unselected = any(call.error for call in (*build.selections, *calls))
            kind = "device" if unselected else "config"
            part = "draft: " if build.model is not None else ""
            build.refusal = Refusal(kind, part + explain(error))
        build.draft_selections = [*calls]
    return build


def _use_groups(config: Any) -> None:
    """Rank 0 of groups of the sizes that the configuration asks for."""
    parallel = config.parallel_config
    data, tensor = parallel.data_parallel_size, parallel.tensor_parallel_size
    context = getattr(parallel, "prefill_context_parallel_size", 1)
    world = data * tensor * context
    sizes = {
        "_WORLD": world, "_TP": tensor, "_DCP": 1, "_PCP": context, "_PP": 1, "_DP": data,
        "_EP": world, "_EPLB": world,
    }  # fmt: skip
    state = importlib.import_module("vllm.distributed.parallel_state")
    for name, size in sizes.items():
        if hasattr(state, name):
            group = SimpleNamespace(
                unique_name=name, world_size=size, ranks=list(range(size)), rank=0,
                rank_in_group=0, local_rank=0, first_rank=0, last_rank=size - 1,
                is_first_rank=True, is_last_rank=size == 1, device_group=None, cpu_group=None,
            )  # fmt: skip
            setattr(state, name, group)


def _draft_config(config: Any) -> Any:
    """The target's configuration with the draft's overrides, as its proposer makes it.

    v1/spec_decode/llm_base_proposer.py of model runner v1; config/speculative.py of v2.
    """
    speculative = config.speculative_config
    if hasattr(speculative, "apply_draft_overrides"):
        return speculative.apply_draft_overrides(config)
    module = importlib.import_module("vllm.v1.spec_decode.llm_base_proposer")
    proposer = SimpleNamespace(speculative_config=speculative, vllm_config=config)
    return module.SpecDecodeBaseProposer._create_draft_vllm_config(proposer)


@contextlib.contextmanager
def on_meta(dtype: Any) -> Iterator[None]:
    """Create tensors without data, also those for "cuda"."""
    torch = importlib.import_module("torch")
    utils = importlib.import_module("vllm.utils.torch_utils")
    _map_experts_on_cpu(torch)
    torch.accelerator.current_device_index = lambda: 0  # the rank that is built

    class CudaIsMeta(torch.overrides.TorchFunctionMode):  # type: ignore[misc,name-defined]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = {name: _meta(torch, value) for name, value in (kwargs or {}).items()}
            return func(*(_meta(torch, value) for value in args), **kwargs)

    with torch.device("meta"), CudaIsMeta(), utils.set_default_torch_dtype(dtype):
        yield


def _map_experts_on_cpu(torch: Any) -> None:
    """Keep the expert map on the CPU: with expert parallelism, constructors read its values."""
    name = "determine_expert_map"
    for module in list(sys.modules.values()):
        function = vars(module).get(name) if isinstance(module, ModuleType) else None
        if function is not None:

            @functools.wraps(function)
            def on_cpu(*args: Any, _function: Any = function, **kwargs: Any) -> Any:
                with torch.device("cpu"):
                    return _function(*args, **kwargs)

            setattr(module, name, on_cpu)


def _meta(torch: Any, value: Any) -> Any:
    is_device = isinstance(value, str | torch.device)
    return "meta" if is_device and str(value).startswith("cuda") else value


@contextlib.contextmanager
def _recorded(log: Log) -> Iterator[list[SelectionCall]]:
    """Record every selection of a MoE backend, wherever it was imported to."""
    calls: list[SelectionCall] = []
    heads, tail = SELECTORS
    for name, module in sorted(sys.modules.items()):
        if not name.startswith("vllm.") or module is None:
            continue
        for attribute, value in list(vars(module).items()):
            if attribute.startswith(heads) and attribute.endswith(tail) and callable(value):
                setattr(module, attribute, _recorder(value, calls, log))
    yield calls


def _recorder(function: Any, calls: list[SelectionCall], log: Log) -> Any:
    if hasattr(function, "__wrapped__"):
        return function

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        call = SelectionCall(function=function, args=args, kwargs=kwargs)
        calls.append(call)
        with log.listen() as call.lines:
            try:
                call.result = function(*args, **kwargs)
            except Exception as error:
                call.error = explain(error)
                raise
        return call.result

    return record
