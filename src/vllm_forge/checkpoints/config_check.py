"""Whether a config.json can be reasoned about: its keys have the types that everything else takes.

A config that lies about sizes is met by what its tensors are; one whose sizes are words, negative
or absurd would end in an error of ours, or in none of memory. Limits are far above any model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.inventory import MODEL_TYPE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Kinds = type | tuple[type, ...]

MOST = 1 << 24
# Key -> the least and the most that it can be.
NUMBERS: dict[str, tuple[int, int]] = {
    "hc_mult": (1, 64),
    "head_dim": (1, MOST),
    "hidden_size": (1, MOST),
    "index_head_dim": (1, MOST),
    "index_n_heads": (1, MOST),
    "moe_intermediate_size": (1, MOST),
    "n_routed_experts": (1, 4096),
    "n_shared_experts": (1, 64),
    "num_attention_heads": (1, MOST),
    "num_experts_per_tok": (1, 4096),
    "num_hash_layers": (0, 1024),
    "num_hidden_layers": (1, 1024),
    "num_nextn_predict_layers": (0, 16),
    "o_groups": (1, MOST),
    "o_lora_rank": (1, MOST),
    "q_lora_rank": (1, MOST),
    "vocab_size": (1, MOST),
}
REQUIRED = ("compress_ratios", *NUMBERS)
MOST_EXPERTS = 1 << 18  # of all layers
DSPARK = {"dspark_markov_rank": (1, MOST)}
SHOWN = 40  # characters of a value in a message
MOST_SHOWN = 5  # problems


def require_deepseek_v4(config: Mapping[str, Any], where: str) -> None:
    """Refuse the config of another model, or one that cannot be right.

    Raises:
        CheckpointUnreadableError: it is one of these; with the first problems.
    """
    if (kind := config.get("model_type")) != MODEL_TYPE:
        raise CheckpointUnreadableError(
            f"model_type is {kind!r}, not {MODEL_TYPE!r}",
            where=where,
            remedy="give a DeepSeek V4 checkpoint",
        )
    if problems := list(config_problems(config)):
        shown, more = problems[:MOST_SHOWN], len(problems) - MOST_SHOWN
        raise CheckpointUnreadableError(
            f"invalid config.json: {'; '.join(shown)}" + (f"; and {more} more" if more > 0 else ""),
            where=where,
            remedy="take it from the source model",
        )


def config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a config.json of DeepSeek-V4, one sentence each."""
    if absent := [key for key in REQUIRED if key not in config]:
        yield f"it lacks {', '.join(absent)}"
        return
    found = list(_sizes(config))
    yield from found
    if not found:
        layers, ratios = config["num_hidden_layers"], config["compress_ratios"]
        if layers * config["n_routed_experts"] > MOST_EXPERTS:
            yield f"{layers} layers of {config['n_routed_experts']} experts are no model"
        if len(ratios) < layers:
            yield f"compress_ratios has {len(ratios)} entries for {layers} layers"
    for key in ("quantization_config", "compression_config"):
        yield from _quantization(config.get(key), key)


def _sizes(config: Mapping[str, Any]) -> Iterator[str]:
    yield from _numbers(config, NUMBERS)
    if not _list_of(config["compress_ratios"], int):
        yield "compress_ratios is no list of numbers"
    if (targets := config.get("dspark_target_layer_ids")) is not None:
        if not _list_of(targets, int) or not targets:
            yield "dspark_target_layer_ids is no list of numbers"
        yield from _numbers(config, DSPARK)


def _numbers(config: Mapping[str, Any], limits: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    for key, (least, most) in limits.items():
        value = config.get(key)
        if type(value) is not int or not least <= value <= most:
            yield f"{key} is {_short(value)}, not a number from {least} to {most}"


def _quantization(found: Any, where: str) -> Iterator[str]:
    if found is None:
        return
    if not isinstance(found, dict):
        yield f"{where} is no object"
        return
    yield from _types(found, where, {"quant_method": str, "format": str, "moe_quant_algo": str})
    if not _rules(found.get("ignore") or []):
        yield f"{where}.ignore is no list of names"
    groups = found.get("config_groups")
    if groups is not None and not isinstance(groups, dict):
        yield f"{where}.config_groups is no object"
    for name, group in groups.items() if isinstance(groups, dict) else ():
        here = f"{where}.config_groups.{name}"
        if not isinstance(group, dict):
            yield f"{here} is no object"
            continue
        if not name.isprintable():
            yield f"{where}.config_groups has the name {_short(name)}"
        if not _rules(group.get("targets") or []):
            yield f"{here}.targets is no list of names"
        yield from _types(group, here, {"weights": dict, "input_activations": dict, "format": str})
        for side in ("weights", "input_activations"):
            if isinstance(arguments := group.get(side), dict):
                yield from _arguments(arguments, f"{here}.{side}")


def _arguments(found: Mapping[str, Any], where: str) -> Iterator[str]:
    """Arguments of a scheme: names, numbers, truth values; block_structure is a list."""
    for key, value in found.items():
        if isinstance(value, list | dict) and key in {"strategy", "type", "actorder", "dynamic"}:
            yield f"{where}.{key} is {_short(value)}"


def _types(found: Mapping[str, Any], where: str, kinds: Mapping[str, Kinds]) -> Iterator[str]:
    for key, kind in kinds.items():
        value = found.get(key)
        if value is not None and not isinstance(value, kind):
            yield f"{where}.{key} is {_short(value)}"


def _list_of(found: Any, kind: type) -> bool:
    return isinstance(found, list) and all(type(item) is kind for item in found)


def _rules(found: Any) -> bool:
    """A list of patterns or names; messages show them, so that they are one line each."""
    return _list_of(found, str) and all(rule.isprintable() for rule in found)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
