"""A checkpoint as its files say: config, shards, and every tensor of its index and headers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.source import CheckpointSource, Folder, find_source
from vllm_forge.checkpoints.tensors import (
    INDEX,
    LENGTH_BYTES,
    MAX_HEADER,
    MIN_HEADER,
    parse_header,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_forge.checkpoints.tensors import StoredTensor

READERS = 16  # range requests at a time
FIRST_READ = 1 << 20  # holds most headers: one request instead of two
SUFFIX = ".safetensors"
OPTIONAL = ("layers.", "embed.", "norm.", "hc_head")  # after "model."
QUANTIZATION = "quantization_config"
# ModelOpt before 0.31 writes it next to config.json (vLLM 0.33.0, transformers_utils/
# config.py:957).
QUANTIZATION_FILE = "hf_quant_config.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was read of a checkpoint.

    Attributes:
        quantization_file: hf_quant_config.json, None without one.
        names: every tensor's name -> shard, from headers, or from the index where there are none;
            a leading "model." that vLLM does not need is left out.
        tensors: name -> tensor; empty when only the index was found.
        index: name -> shard as the index says; None without one.
        total_size: bytes of all tensors as the index says.
        missing_shards: named by the index and not found.
    """

    source: CheckpointSource
    config: dict[str, Any]
    quantization_file: dict[str, Any] | None
    names: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    index: Mapping[str, str] | None
    total_size: int | None
    missing_shards: tuple[str, ...]

    @classmethod
    def open(cls, where: CheckpointSource | Path | str) -> Checkpoint:
        """Read config, index and headers.

        Args:
            where: a source, a folder, or what ``find_source`` takes.

        Raises:
            CheckpointUnreadableError: no config, no tensors, malformed JSON, a broken shard, or a
                tensor in two shards.
        """
        if isinstance(where, CheckpointSource):
            source = where
        else:
            source = Folder(where) if isinstance(where, Path) else find_source(where)
        config, quantization = source.config(), source.json(QUANTIZATION_FILE)
        index = source.json(INDEX)
        weight_map = None if index is None else _weight_map(index, source)
        if weight_map is None:
            shards = sorted(filter(_is_loaded, source.sizes))
        else:
            shards = sorted(set(weight_map.values()))
        if not shards:
            raise CheckpointUnreadableError("there are no tensors", where=str(source))
        missing = tuple(s for s in shards if s not in source.sizes or not _is_loaded(s))
        tensors = _headers(source, [shard for shard in shards if shard not in missing])
        metadata = (index or {}).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        return cls(
            source=source,
            config=config,
            quantization_file=quantization,
            names={name: tensor.shard for name, tensor in tensors.items()} or weight_map or {},
            tensors=tensors,
            index=weight_map,
            total_size=total if type(total) is int else None,
            missing_shards=missing,
        )

    @cached_property
    def served(self) -> Mapping[str, Any]:
        """The config as vLLM reads it: with hf_quant_config.json where it has no quantization."""
        if self.quantization_file is None or self.config.get(QUANTIZATION) is not None:
            return self.config
        return {**self.config, QUANTIZATION: self.quantization_file}

    @property
    def folder(self) -> Path:
        """The folder of a local checkpoint."""
        if not isinstance(self.source, Folder):
            raise TypeError(f"{self.source} is not a folder")
        return self.source.path

    @property
    def shards(self) -> list[str]:
        """Names of the files, in order."""
        return sorted(set(self.names.values()))

    @property
    def files(self) -> list[Path]:
        """The shards of a local checkpoint."""
        return [self.folder / shard for shard in self.shards]

    @property
    def bytes(self) -> int | None:
        """Of all tensors; None when only the index was found."""
        return sum(t.size for t in self.tensors.values()) if self.tensors else None

    @cached_property
    def misplaced(self) -> list[str]:
        """Tensors that are not where the index says, or that it does not have."""
        if self.index is None or not self.tensors:
            return []
        listed = {name for name, shard in self.index.items() if shard not in self.missing_shards}
        moved = {
            name
            for name in listed & self.tensors.keys()
            if self.index[name] != self.tensors[name].shard
        }
        return sorted((listed ^ self.tensors.keys()) | moved)


def plain_name(name: str) -> str:
    """Without "model." in front, where vLLM's loaders take a name with and without it.

    They put it there themselves (0.33.0, models/deepseek_v4/nvidia/model.py:1251), and know neither
    ``model.head`` nor ``model.mtp``.
    """
    plain = name.removeprefix("model.")
    return plain if plain.startswith(OPTIONAL) else name


def read_header(source: CheckpointSource, shard: str) -> list[StoredTensor]:
    """The tensors of one shard, by position; their data is not read.

    Raises:
        CheckpointUnreadableError: not a safetensors file, or cut off, or bytes that do not add up.
    """
    size = source.sizes[shard]
    first = source.read(shard, 0, min(size, FIRST_READ))
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    start = LENGTH_BYTES + length
    try:
        if not MIN_HEADER <= length <= MAX_HEADER or start > size:
            raise ValueError(f"a header of {length} bytes in a file of {size}")  # noqa: TRY301
        text = first[LENGTH_BYTES:start]
        if len(text) < length:
            text += source.read(shard, LENGTH_BYTES + len(text), start)
        return parse_header(text, size, source, shard)
    except ValueError as error:
        raise CheckpointUnreadableError(
            f"{shard} is not a whole safetensors file: {error}",
            where=str(source),
            remedy="an interrupted download or copy: fetch that file again",
        ) from None


def _is_loaded(shard: str) -> bool:
    """Whether vLLM's pattern, *.safetensors in the folder itself, matches a file."""
    return shard.endswith(SUFFIX) and not shard.startswith(".") and "/" not in shard


def _headers(source: CheckpointSource, shards: list[str]) -> dict[str, StoredTensor]:
    with ThreadPoolExecutor(READERS) as pool:
        headers = list(pool.map(lambda shard: read_header(source, shard), shards))
    tensors: dict[str, StoredTensor] = {}
    for tensor in (tensor for header in headers for tensor in header):
        name = plain_name(tensor.name)
        if name in tensors:
            raise CheckpointUnreadableError(
                f"{name} is in {tensors[name].shard} and in {tensor.shard}", where=str(source)
            )
        tensors[name] = tensor
    return tensors


def _weight_map(index: Mapping[str, Any], source: CheckpointSource) -> dict[str, str]:
    rows = index.get("weight_map")
    if not isinstance(rows, dict) or not all(
        isinstance(file, str)
        and file == Path(file).name != ".."
        and file != ""
        and f"{name}{file}".isprintable()
        for name, file in rows.items()
    ):
        raise CheckpointUnreadableError(
            f"{INDEX} has no weight_map of tensors to files of its own folder", where=str(source)
        )
    return {plain_name(name): shard for name, shard in rows.items()}
