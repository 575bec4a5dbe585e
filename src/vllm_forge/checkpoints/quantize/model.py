"""The model that is to be quantized: complete, unquantized, and nothing lost before it got here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.config_check import require_deepseek_v4
from vllm_forge.checkpoints.errors import ModelInputError
from vllm_forge.checkpoints.inventory import all_tensors, has_dspark
from vllm_forge.checkpoints.tensors import INDEX, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

SHOWN = 5
QUANTIZED = ("quantization_config", "compression_config")
# Where the drafter's loader looks for embedding and output head (vLLM 0.26.0,
# vllm/models/deepseek_v4/nvidia/mtp.py, WEIGHT_NAME_REMAPPING): name in the block -> whose bytes.
ALIASES = {"emb.tok_emb.weight": "embed.weight", "head.weight": "head.weight"}


def open_model(folder: Path) -> Checkpoint:
    """Open the model and compare it with what its config implies.

    Raises:
        CheckpointUnreadableError: another model, or a file of it is missing or malformed.
        ModelInputError: a quantized one, shards that are not those of the index, or tensors that
            are missing, unknown, of the wrong shape, or of a dtype that has lost precision already.
    """
    checkpoint = Checkpoint.open(folder)
    require_deepseek_v4(checkpoint.config, str(folder))
    if any(checkpoint.config.get(key) is not None for key in QUANTIZED):
        raise ModelInputError(
            "the model is quantized already",
            where=str(folder),
            remedy="start from the BF16 model: convert the published FP8 one first",
        )
    _require_whole(checkpoint)
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


def _require_whole(checkpoint: Checkpoint) -> None:
    """Refuse shards that are not those of the index."""
    where = str(checkpoint.source)
    unlisted = checkpoint.index is None and len(checkpoint.shards) > 1
    for missing in (INDEX,) if unlisted else checkpoint.missing_shards:
        raise ModelInputError(f"missing {missing}", where=where, remedy="fetch it again")
    if checkpoint.misplaced:
        raise ModelInputError(
            f"{INDEX} does not match the shards: {len(checkpoint.misplaced)} tensors are not where "
            f"it says, e.g. {checkpoint.misplaced[0]}",
            where=where,
            remedy="fetch index and shards of the same revision",
        )


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


def _problems(checkpoint: Checkpoint, expected: dict[str, TensorSpec]) -> Iterator[str]:
    for name, tensor in expected.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            yield f"{name} is missing"
        elif stored.shape != tensor.shape:
            yield f"{name} is {list(stored.shape)}, not {list(tensor.shape)}"
        elif stored.dtype not in {tensor.dtype, *(["F32"] if tensor.dtype == "BF16" else [])}:
            yield f"{name} is {stored.dtype}, not {tensor.dtype}"
    for name, stored in checkpoint.tensors.items():
        if name not in expected or stored.name != name:
            yield f"{stored.name} is not a tensor of this model"
