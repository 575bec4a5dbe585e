"""Which backend took the routed experts, what was passed over, and whether the clamp arrives."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .facts import MEGA_MOE
from .serving import explain, forget_once

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .building import SelectionCall
    from .serving import Log

UNSUPPORTED = re.compile(
    r"backend '(?P<name>\w+)' does not support the deployment configuration"
    r"(?: since (?P<why>.*?))?\.?$"
)
LIMITED = "not considered: the model sets swiglu_limit"
MISSING = re.compile(r"has no attribute '(\w+)'")
MOST_MISSING = 20

Facts = dict[str, Any]


def name_of(value: Any) -> str:
    """A backend's name: an enum's, or the string that older methods keep."""
    return str(getattr(value, "name", value)).upper()


def moe_facts(model: Any, selections: list[SelectionCall], log: Log) -> Facts | None:
    """The fields of the model's Moe, of the first layer; all layers must agree."""
    layers = list(_routed_experts(model)) if model is not None else []
    if selections:
        facts = _selected(selections, log)
    elif layers:
        facts = _by_method(layers[0].quant_method)
    else:
        return _mega_moe(model)
    if layers:
        wanted = getattr(layers[0], "swiglu_limit", None)
        facts["limit"] = _limit_at_kernel(layers[0])
        if wanted is not None:
            facts["clamp"] = "reaches" if facts["limit"] == wanted else "lost"
    return facts


def _mega_moe(model: Any) -> Facts | None:
    """Experts that no selection chose, as --moe-backend=deep_gemm_mega_moe builds them.

    The layer above hands its swiglu_limit to each call: models/deepseek_v4/nvidia/model.py:628 of
    0.22.1 and :718 of 0.26.0; since then the experts have it (:390 of 0.33.0).
    """
    modules = dict(model.named_modules()) if model is not None else {}
    for name, module in modules.items():
        if type(module).__name__.endswith(MEGA_MOE):
            limit = getattr(modules[name.rpartition(".")[0]], "swiglu_limit", None)
            facts = {"chosen": "DEEP_GEMM_MEGA_MOE", "kernel": type(module).__name__}
            clamp = "none" if limit is None else "reaches"
            return facts | {"error": None, "rejected": [], "limit": limit, "clamp": clamp}
    return None


def _routed_experts(model: Any) -> Iterable[Any]:
    """Layers with fused experts, in the model's order."""
    for _, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if hasattr(method, "get_fused_moe_quant_config"):
            yield module


def _selected(selections: list[SelectionCall], log: Log) -> Facts:
    first = selections[0]
    results = {str(call.result) for call in selections}
    if len(results) > 1:
        raise AssertionError(f"layers differ in their MoE backend: {sorted(results)}")
    facts = _outcome(first)
    facts["rejected"] = _rejected(first.lines)
    unlimited = _without_limit(first, log)
    if unlimited is not None:
        facts["without_limit"] = _outcome(unlimited)["chosen"]
        asked = {row["candidate"] for row in facts["rejected"]} | {facts["chosen"]}
        names = [row["candidate"] for row in _rejected(unlimited.lines)]
        names.append(facts["without_limit"])
        facts["rejected"] += [
            {"candidate": name, "reason": LIMITED}
            for name in dict.fromkeys(names)
            if name is not None and name not in asked
        ]
    return facts


def _outcome(call: SelectionCall) -> Facts:
    if call.result is None:
        return {"chosen": None, "kernel": None, "error": call.error}
    backend, kernel = call.result
    return {
        "chosen": name_of(backend),
        "kernel": None if kernel is None else kernel.__name__,
        "error": None,
    }


def _rejected(lines: list[tuple[int, str]]) -> list[Facts]:
    """Candidates that the selection passed over, by its log lines."""
    rows = [
        {"candidate": match["name"], "reason": match["why"] or "no reason given"}
        for _, text in lines
        if (match := UNSUPPORTED.search(text)) is not None
    ]
    return [row for number, row in enumerate(rows) if row not in rows[:number]]


def _without_limit(call: SelectionCall, log: Log) -> SelectionCall | None:
    """Repeat the call for a model without a SwiGLU limit; None where it has none already."""
    values = [*call.args, *call.kwargs.values()]
    if all(getattr(value, "swiglu_limit", None) is None for value in values):
        return None
    forget_once()
    again = dataclasses.replace(
        call,
        args=tuple(_unlimited(value) for value in call.args),
        kwargs={name: _unlimited(value) for name, value in call.kwargs.items()},
        lines=[],
        result=None,
        error=None,
    )
    with log.listen() as again.lines:
        try:
            again.result = again.function(*again.args, **again.kwargs)
        except (NotImplementedError, ValueError) as error:
            again.error = explain(error)
    return again


def _unlimited(value: Any) -> Any:
    if getattr(value, "swiglu_limit", None) is None:
        return value
    return dataclasses.replace(value, swiglu_limit=None)


def _by_method(method: Any) -> Facts:
    """Facts of methods that choose in their constructor: WNA16 of vLLM 0.22."""
    return {
        "chosen": name_of(method.kernel_backend),
        "kernel": type(method).__name__,
        "error": None,
        "rejected": [],
    }


def _limit_at_kernel(layer: Any) -> float | None:
    """The SwiGLU limit in what the method hands to its kernel.

    Either the method calls the kernel itself (WNA16 of vLLM 0.22), or it makes a
    FusedMoEQuantConfig for one. Both read tensors that only loading makes.
    """
    method = layer.quant_method
    module = sys.modules[type(method).__module__]
    if hasattr(module, "fused_marlin_moe"):
        return _limit_of_call(module, method, layer)
    humming = "get_humming_moe_quant_config"
    for name in list(sys.modules):
        if hasattr(sys.modules[name], humming) and name.startswith("vllm."):
            setattr(sys.modules[name], humming, lambda _layer, **given: SimpleNamespace(**given))
    config = _with_stand_ins(layer, lambda: method.get_fused_moe_quant_config(layer))
    limit = getattr(config, "gemm1_clamp_limit", None)
    if limit is None:
        limit = _limit_of_activation(method, config)
    return None if limit is None else float(limit)


def _limit_of_activation(method: Any, config: Any) -> float | None:
    """From 0.33.0 on, experts that know no other limit take the model's (activation.py:184)."""
    module = importlib.import_module("vllm.model_executor.layers.fused_moe.activation")
    kind = getattr(module, "ApplyMoEActivationConfig", None)
    if kind is None or config is None:
        return None
    limit: float | None = kind.from_configs(method.moe, config).clamp_limit
    return limit


def _limit_of_call(module: Any, method: Any, layer: Any) -> float | None:
    seen: list[Any] = []

    def kernel(*_args: Any, **given: Any) -> None:
        seen.append(given.get("clamp_limit"))

    with contextlib.ExitStack() as stack:
        stack.callback(setattr, module, "fused_marlin_moe", module.fused_marlin_moe)
        module.fused_marlin_moe = kernel
        nothing = SimpleNamespace()
        _with_stand_ins(
            layer,
            lambda: method.apply(
                layer, nothing, nothing, nothing, shared_experts=None, shared_experts_input=None
            ),
        )
    (limit,) = seen
    return None if limit is None else float(limit)


def _with_stand_ins(layer: Any, call: Any) -> Any:
    """Call, and give the layer each tensor that is missing because nothing was loaded."""
    torch = importlib.import_module("torch")
    for _ in range(MOST_MISSING):
        try:
            return call()
        except AttributeError as error:
            missing = MISSING.search(str(error))
            if missing is None or not missing[1].startswith(("w13_", "w2_", "workspace")):
                raise
            setattr(layer, missing[1], torch.ones(1, device="cpu"))
    raise AssertionError("a MoE method asks for ever more tensors")
