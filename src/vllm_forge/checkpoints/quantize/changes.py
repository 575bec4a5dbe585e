"""Small changes of a finished checkpoint: tensors dropped, renamed, transformed; config edited.

Only bytes are moved: a variant differs from its parent in what it names, and in nothing else. A
manifest would contradict it, so it has none.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.errors import RecipeError
from vllm_forge.checkpoints.quantize.artifact import MANIFEST
from vllm_forge.checkpoints.tensors import (
    CONFIG,
    INDEX,
    TensorToWrite,
    copy_of,
    in_memory,
    write_index,
    write_shard,
)
from vllm_forge.host import atomic_path, link_or_copy
from vllm_forge.matrix import FrozenModel

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

# One less in a float's exponent, seen as an integer of the same width.
E4M3_HALVED, F32_HALVED = 1 << 3, 1 << 23


class Change(FrozenModel):
    """One row of a variant: exactly one of the kinds; see the head of variants.toml."""

    drop: str | None = None
    rename: tuple[str, str] | None = None
    transform: str | None = None
    on: str | None = None
    set_: dict[str, str] | None = Field(default=None, alias="set")

    @model_validator(mode="after")
    def _one_kind(self) -> Change:
        given = [self.drop, self.rename, self.transform, self.set_]
        if sum(kind is not None for kind in given) != 1:
            raise ValueError("a change is one of drop, rename, transform, set")
        if (self.on is not None) != (self.transform in TENSORS):
            raise ValueError(f"transform {self.transform!r}: wrong name, or `on` missing or idle")
        return self


def apply_changes(parent: Checkpoint, changes: Sequence[Change], folder: Path) -> None:
    """Write a copy of ``parent`` with changes; files that stay the same are hard links.

    Args:
        parent: the checkpoint to start from.
        changes: in order.
        folder: appears when everything is in it; its files are read-only.

    Raises:
        RecipeError: a change that changes nothing.
    """
    files: dict[str, list[TensorToWrite]] = {}
    for tensor in parent.tensors.values():
        files.setdefault(tensor.shard, []).append(copy_of(tensor))
    config = json.loads(json.dumps(parent.config))
    touched: set[str] = set()
    for change in changes:
        before = (json.dumps(config), set(touched))
        if change.set_ is not None:
            for path, value in change.set_.items():
                _set(config, path, json.loads(value))
        elif change.transform is not None and change.transform in CONFIGS:
            CONFIGS[change.transform](config, [item.name for f in files.values() for item in f])
        else:
            files = {name: _changed(items, change, name, touched) for name, items in files.items()}
        if before == (json.dumps(config), touched):
            raise RecipeError(f"a change matches nothing: {change.model_dump(exclude_none=True)}")
    write_derived(parent, folder, files, config, same=set(files) - touched)


def write_derived(
    parent: Checkpoint,
    folder: Path,
    files: Mapping[str, Sequence[TensorToWrite]],
    config: dict[str, Any],
    *,
    same: Collection[str] = (),
) -> None:
    """Write a checkpoint that is another one with other tensors.

    Args:
        parent: whose other files, but the manifest, are copied.
        folder: appears when everything is in it; its files are read-only.
        files: tensors by file name.
        config: config.json.
        same: files that are the parent's; hard links to them.
    """
    with atomic_path(folder) as aside:
        aside.mkdir()
        for name, items in files.items():
            if name in same:
                link_or_copy(parent.folder / name, aside / name)
            else:
                write_shard(aside / name, items)
        write_index(aside, files)
        (aside / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for path in parent.folder.iterdir():
            if path.suffix != ".safetensors" and path.name not in {CONFIG, INDEX, MANIFEST}:
                shutil.copyfile(path, aside / path.name)
        for path in aside.iterdir():
            path.chmod(0o444)  # shared with the parent


def _set(config: dict[str, Any], path: str, value: Any) -> None:
    """Set or, with None, delete; keys that hold None in the parent are set to it."""
    *parents, leaf = path.split(".")
    for key in parents:
        config = config[key]
    if value is None and leaf not in NULLABLE:
        del config[leaf]
    else:
        config[leaf] = value


NULLABLE = {"input_activations"}  # None is a value of it, and what the tools write


def _changed(
    items: Sequence[TensorToWrite], change: Change, file: str, touched: set[str]
) -> list[TensorToWrite]:
    """The tensors of one file after a change."""
    pattern = change.drop or change.on or (change.rename or ("",))[0]
    made: list[TensorToWrite] = []
    for item in items:
        if not re.search(pattern, item.name):
            made.append(item)
            continue
        touched.add(file)
        if change.rename is not None:
            name = re.sub(*change.rename, item.name)
            made.append(_with(item, name=name))
        elif change.transform is not None:
            made += TENSORS[change.transform](item)
    return made


def _with(
    item: TensorToWrite, *, name: str = "", shape: tuple[int, ...] | None = None
) -> TensorToWrite:
    return TensorToWrite(
        name=name or item.name,
        dtype=item.dtype,
        shape=item.shape if shape is None else shape,
        chunks=item.chunks,
    )


def _data(item: TensorToWrite) -> bytes:
    return b"".join(item.chunks())


def scalars_to_lists(item: TensorToWrite) -> list[TensorToWrite]:
    """Shape () -> (1,)."""
    return [_with(item, shape=(1,))]


def halve_global_scales(item: TensorToWrite) -> list[TensorToWrite]:
    """Half the divisor and half of each block scale: every weight keeps its value.

    Exact: one less in the exponent, which no scale of the tiny model has at its lowest.
    """
    match item.dtype:
        case "F32":
            data = (np.frombuffer(_data(item), "<u4") - F32_HALVED).astype("<u4").tobytes()
        case _:
            codes = np.frombuffer(_data(item), np.uint8)
            if codes.min() < 2 * E4M3_HALVED:
                raise RecipeError(f"{item.name}: a block scale cannot be halved")
            data = (codes - E4M3_HALVED).tobytes()
    return [in_memory(item.name, item.dtype, item.shape, data)]


def downcast(item: TensorToWrite) -> list[TensorToWrite]:
    """FP32 -> BF16, to nearest, ties to even; other dtypes stay."""
    if item.dtype != "F32":
        return [item]
    wide = np.frombuffer(_data(item), "<u4").astype(np.uint64)
    narrow = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype("<u2")
    return [in_memory(item.name, "BF16", item.shape, narrow.tobytes())]


def split_rows(item: TensorToWrite) -> list[TensorToWrite]:
    """A matrix -> one tensor per row, ``<module>.<row>.weight``."""
    module, _, leaf = item.name.rpartition(".")
    data, count = _data(item), item.shape[0]
    width = len(data) // count
    return [
        in_memory(f"{module}.{row}.{leaf}", item.dtype, item.shape[1:], data[at : at + width])
        for row, at in enumerate(range(0, len(data), width))
    ]


def literal_ignore(config: dict[str, Any], names: Sequence[str]) -> None:
    """Every unquantized module by its name in the checkpoint, in place of patterns."""
    quantized = {name.rpartition(".")[0] for name in names if name.endswith("_scale")}
    modules = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    config["quantization_config"]["ignore"] = sorted(modules - quantized)


TENSORS: Mapping[str, Callable[[TensorToWrite], list[TensorToWrite]]] = {
    function.__name__: function
    for function in (scalars_to_lists, halve_global_scales, downcast, split_rows)
}
CONFIGS: Mapping[str, Callable[[dict[str, Any], Sequence[str]], None]] = {
    function.__name__: function for function in (literal_ignore,)
}
