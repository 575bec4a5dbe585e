"""The model that is to be quantized: complete, unquantized, and nothing lost before it got here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.config_check import config_problems
from vllm_forge.checkpoints.errors import ModelInputError
from vllm_forge.checkpoints.inventory import MODEL_TYPE, Expected, all_tensors, has_dspark
from vllm_forge.checkpoints.shards import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

SHOWN = 5
QUANTIZED = ("quantization_config", "compression_config")
# Where the drafter's loader looks for embedding and output head (vLLM 0.26.0,
# vllm/models/deepseek_v4/nvidia/mtp.py, WEIGHT_NAME_REMAPPING): name in the block -> whose bytes.
ALIASES = {"emb.tok_emb.weight": "embed.weight", "head.weight": "head.weight"}


def open_source(folder: Path) -> Checkpoint:
    """Open the model and compare it with what its config says it must have.

    Raises:
        ModelInputError: another model type, a quantized one, or tensors that are missing, unknown,
            of the wrong shape, or of a dtype that has lost precision already.
    """
    checkpoint = open_checkpoint(folder)
    kind = checkpoint.config.get("model_type")
    if kind != MODEL_TYPE:
        raise ModelInputError(f"model_type is {kind!r}, not {MODEL_TYPE!r}", where=str(folder))
    if any(checkpoint.config.get(key) is not None for key in QUANTIZED):
        raise ModelInputError(
            "the model is quantized already",
            where=str(folder),
            remedy="start from the BF16 model: convert the published FP8 one first",
        )
    if wrong := list(config_problems(checkpoint.config)):
        raise ModelInputError(
            f"config.json cannot be right: {'; '.join(wrong[:SHOWN])}",
            where=str(folder),
            remedy="take config.json from the model's repository",
        )
    expected = {tensor.name: tensor for tensor in all_tensors(checkpoint.config)}
    for name, origin in _aliases(checkpoint.config).items():
        if name in checkpoint.tensors:
            expected[name] = replace(expected[origin], name=name)
    if problems := list(_problems(checkpoint, expected)):
        shown = "\n".join(f"  - {problem}" for problem in problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ModelInputError(
            f"not the tensors that config.json describes:\n{shown}{more}",
            where=str(folder),
            remedy="an interrupted download, or a conversion that dropped or changed tensors: "
            "make the BF16 model again",
        )
    return checkpoint


def alias_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Aliases that the drafter needs and the model does not have: name -> whose bytes."""
    wanted = _aliases(checkpoint.config)
    return {name: source for name, source in wanted.items() if name not in checkpoint.tensors}


def _aliases(config: Mapping[str, Any]) -> dict[str, str]:
    """All that the drafter's loader looks for."""
    if has_dspark(config):
        return {}
    return {
        f"mtp.{index}.{leaf}": source
        for index in range(config["num_nextn_predict_layers"])
        for leaf, source in ALIASES.items()
    }


def _problems(checkpoint: Checkpoint, expected: dict[str, Expected]) -> Iterator[str]:
    for name, tensor in expected.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            yield f"{name} is missing"
        elif stored.shape != tensor.shape:
            yield f"{name} is {list(stored.shape)}, not {list(tensor.shape)}"
        elif stored.dtype not in {tensor.dtype, *(["F32"] if tensor.dtype == "BF16" else [])}:
            yield f"{name} is {stored.dtype}, not {tensor.dtype}"
    for name in checkpoint.tensors:
        if name not in expected:
            yield f"{name} is not a tensor of this model"
