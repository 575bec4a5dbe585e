"""The forms in which a checkpoint's configuration is written, brought into the one that gates read.

vLLM takes all of them. What a dry load is given is the config as vLLM itself would read it; the
keys that are filled in here are for our own reasoning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

QUANTIZATION = "quantization_config"
# ModelOpt before 0.31 leaves it beside config.json (vLLM 0.33.0, transformers_utils/config.py:957).
QUANTIZATION_FILE = "hf_quant_config.json"
DRAFTS = "num_nextn_predict_layers"
RATIOS = "compress_ratios"
HASHED = "num_hash_layers"


def with_quantization_file(
    config: Mapping[str, Any], beside: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The config with hf_quant_config.json's content, where it says nothing of a quantization."""
    if beside is None or config.get(QUANTIZATION) is not None:
        return dict(config)
    return {**config, QUANTIZATION: beside}


def filled_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of DeepSeek's own config.json, from those that other writers have instead.

    transformers writes ``layer_types``, ``compress_rates`` and ``mlp_layer_types`` (5.17.0,
    configuration_deepseek_v4.py:250-282). A config without a number of draft layers has none.
    """
    found = {DRAFTS: 0, **config}
    types, rates = config.get("layer_types"), config.get("compress_rates")
    if RATIOS not in found and isinstance(types, list) and isinstance(rates, dict):
        found[RATIOS] = [rates.get(kind, 0) if isinstance(kind, str) else None for kind in types]
    kinds = config.get("mlp_layer_types")
    if HASHED not in found and isinstance(kinds, list):
        found[HASHED] = kinds.count("hash_moe")
    return found


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of the quantization, with ``quant_method`` as vLLM spells it; empty for none.

    vLLM 0.33.0, transformers_utils/model_arch_config_convertor.py:241.
    """
    found = config.get(QUANTIZATION)
    if found is None:
        found = config.get("compression_config")
    if not isinstance(found, dict):
        return {}
    method = found.get("quant_method")
    if not isinstance(method, str):
        return found
    spelled = method.lower().replace("compressed_tensors", "compressed-tensors")
    return {**found, "quant_method": spelled}
