"""What a place holds: config, shards, and every tensor that its index and headers name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.inspect.config_forms import (
    QUANTIZATION_FILE,
    filled_in,
    with_quantization_file,
)
from vllm_forge.checkpoints.inspect.header import Entry, read_header
from vllm_forge.checkpoints.shards import CONFIG, INDEX, is_weight_map
from vllm_forge.checkpoints.spans import strict_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_forge.checkpoints.inspect.places import Place

READERS = 16  # range requests at a time
SUFFIX = ".safetensors"
OPTIONAL = ("layers.", "embed.", "norm.", "hc_head")  # after "model."


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A checkpoint as far as it was read.

    Attributes:
        place: where.
        config: config.json, parsed; keys that it has in another form are filled in.
        served: the same as vLLM reads it.
        names: every tensor's name -> shard, from headers, or from the index where they are not
            at hand; a leading "model." that vLLM does not need is left out.
        tensors: name -> entry; None when only the index is at hand.
        index: name -> shard as the index says; None without one.
        total_size: bytes of all tensors as the index says.
        missing_shards: named by the index, not there.
    """

    place: Place
    config: Mapping[str, Any]
    served: Mapping[str, Any]
    names: Mapping[str, str]
    tensors: Mapping[str, Entry] | None
    index: Mapping[str, str] | None
    total_size: int | None
    missing_shards: tuple[str, ...]

    @property
    def shards(self) -> list[str]:
        """Names of the files, in order."""
        return sorted(set(self.names.values()))

    @property
    def bytes(self) -> int | None:
        """Of all tensors; None when only the index is at hand."""
        return None if self.tensors is None else sum(e.size for e in self.tensors.values())


def look(place: Place) -> Seen:
    """Read config, index and headers.

    Raises:
        CheckpointUnreadableError: no config, no tensors, malformed JSON, a broken shard, or a
            tensor in two shards.
        HubUnreachableError: the hub stopped answering.
    """
    config = _json(place, CONFIG)
    if config is None:
        raise CheckpointUnreadableError(
            f"there is no {CONFIG}", where=str(place), remedy="take it from the model's repository"
        )
    served = with_quantization_file(config, _json(place, QUANTIZATION_FILE))
    index = _json(place, INDEX)
    weight_map = None
    if index is not None:
        weight_map = _weight_map(index, place)
        shards = sorted(set(weight_map.values()))
    else:
        shards = sorted(name for name in place.sizes if _is_loaded(name))
    if not shards:
        raise CheckpointUnreadableError("there are no tensors", where=str(place))
    missing = tuple(s for s in shards if s not in place.sizes or not _is_loaded(s))
    tensors = None
    if weight_map is None or len(missing) < len(shards):
        tensors = _headers(place, [shard for shard in shards if shard not in missing])
    names = {name: e.shard for name, e in tensors.items()} if tensors else dict(weight_map or {})
    metadata = (index or {}).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Seen(
        place=place,
        config=filled_in(served),
        served=served,
        names=names,
        tensors=tensors,
        index=weight_map,
        total_size=total if type(total) is int else None,
        missing_shards=missing,
    )


def plain_name(name: str) -> str:
    """Without "model." in front, where vLLM's loaders take a name with and without it.

    They put it there themselves (0.33.0, models/deepseek_v4/nvidia/model.py:1251), and know neither
    ``model.head`` nor ``model.mtp``.
    """
    plain = name.removeprefix("model.")
    return plain if plain.startswith(OPTIONAL) else name


def _is_loaded(shard: str) -> bool:
    """Whether vLLM's pattern, *.safetensors in the folder itself, means a file."""
    return shard.endswith(SUFFIX) and not shard.startswith(".") and "/" not in shard


def _headers(place: Place, shards: list[str]) -> dict[str, Entry]:
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda shard: read_header(place, shard, place.sizes[shard]), shards))
    tensors: dict[str, Entry] = {}
    for entries in found:
        for entry in entries:
            name = plain_name(entry.name)
            if name in tensors:
                raise CheckpointUnreadableError(
                    f"{name} is in {tensors[name].shard} and in {entry.shard}", where=str(place)
                )
            tensors[name] = entry
    return tensors


def _weight_map(index: Any, place: Place) -> dict[str, str]:
    rows = index.get("weight_map")
    if not is_weight_map(rows):
        raise CheckpointUnreadableError(
            f"{INDEX} has no weight_map of tensors to files beside it", where=str(place)
        )
    return {plain_name(name): shard for name, shard in rows.items()}


def _json(place: Place, name: str) -> Any:
    text = place.text(name)
    if text is None:
        return None
    try:
        value = strict_json(text)
    except ValueError as error:
        raise CheckpointUnreadableError(f"{name} is not JSON: {error}", where=str(place)) from None
    if not isinstance(value, dict):
        raise CheckpointUnreadableError(f"{name} is not a JSON object", where=str(place))
    return value
