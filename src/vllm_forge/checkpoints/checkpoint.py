"""A checkpoint as its files say: config, shards, and every tensor of its index and headers.

A source is where it is: a folder, an index file alone, or a repository of the model hub. It gives
files and byte ranges of them, and does not interpret them.
"""

import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from threading import Lock
from typing import Any, Self

from vllm_forge.checkpoints.errors import CheckpointUnreadableError, HubUnreachableError
from vllm_forge.checkpoints.fixtures.sparse import SIGN
from vllm_forge.checkpoints.tensors import CONFIG, INDEX, MAX_NAME, StoredTensor, read_header
from vllm_forge.host import open_plain, parse_json, printable

# Bytes of a JSON file, and of config.json: a manifest.json of 135,000 tensors has 3e7, a config
# that ignores each of their modules 7e6.
MAX_TEXT, MAX_CONFIG = 1 << 28, 1 << 24
# Bytes of all headers: those of 135,000 tensors have 2e7, and take ten times that in memory.
MAX_HEADERS = 1 << 28
LFS = b"version https://git-lfs."  # a pointer to a file begins so (its docs/spec.md)
NUMBERED = re.compile(r"(.*-)\d{5}(-of-(0\d{4})\.safetensors)")
REPOSITORY = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
HUB_TIMEOUT_S = 30.0
HUB_LIMIT_S = 600  # of a range
HUB_RETRIES = 2  # of a range, after a lost connection, a 429 or a 5xx
SHOWN = 200  # characters of a name that the user gave
READERS = 16  # range requests at a time
SUFFIX = ".safetensors"
LEAST_STORED = 0.1  # of a checkpoint's bytes; quantized weights do not compress, holes take none
OPTIONAL = ("layers.", "embed.", "norm.", "hc_head")  # after "model."
QUANTIZATION = "quantization_config"
# ModelOpt before 0.31 writes it next to config.json (vLLM 0.33.0, transformers_utils/
# config.py:957).
QUANTIZATION_FILE = "hf_quant_config.json"


class CheckpointSource(ABC):
    """A checkpoint's files. ``sizes``: file name -> bytes.

    All methods raise CheckpointUnreadableError: a file is missing, shorter, too large, malformed
    or foreign; HubUnreachableError: the hub stopped answering.
    """

    sizes: Mapping[str, int]

    @property
    def worthless(self) -> str:
        """By what its files are those of a rehearsal, whatever they say; empty if they are not."""
        return ""

    def error(self, what: str, remedy: str = "") -> CheckpointUnreadableError:
        return CheckpointUnreadableError(what, where=self, remedy=remedy)

    @abstractmethod
    def read(self, name: str, begin: int, end: int) -> bytearray:
        """Bytes ``begin`` to ``end`` of a file; exactly as many, or an error."""

    def malformed(self, name: str, problem: str) -> CheckpointUnreadableError:
        """The error of a file that is not what its name says."""
        if self.read(name, 0, min(self.sizes[name], len(LFS))) == LFS:
            return self.error(f"{name} is a Git LFS pointer", "run git lfs pull, or fetch the file")
        remedy = "an interrupted download or copy: fetch that file again"
        return self.error(f"{name} is not {problem}", remedy)

    def json(self, name: str, *, any_value: bool = False) -> Any:
        """The JSON object in a file, or whatever JSON it has; None where there is no such file."""
        if (size := self.sizes.get(name)) is None:
            return None
        most = MAX_CONFIG if name in (CONFIG, QUANTIZATION_FILE) else MAX_TEXT
        if size > most:
            raise self.error(f"{name} has {size} bytes, more than {most}")
        try:
            value = parse_json(bytes(self.read(name, 0, size)))
        except ValueError as error:
            raise self.malformed(name, f"JSON: {error}") from None
        if not isinstance(value, dict) and not any_value:
            raise self.malformed(name, "a JSON object")
        return value

    def config(self) -> dict[str, Any]:
        """The content of config.json, which must be there."""
        if (config := self.json(CONFIG)) is None:
            raise self.error(f"missing {CONFIG}", "take it from the model's repository")
        return dict(config)


class Folder(CheckpointSource):
    """A local folder, or some files of it; listed once, when it is opened.

    Links are followed within the folder and to the blobs of the model hub's cache; those of shards
    anywhere, as they are neither shown nor copied.
    """

    def __init__(self, path: Path, *, index_only: bool = False) -> None:
        self.path = path
        self.files: dict[str, Path] = {}  # without links
        try:
            folder = path.resolve()
            inside = {folder}
            if folder.parent.name == "snapshots":
                inside.add(folder.parents[1] / "blobs")
            for item in path.iterdir():
                if not item.is_file() or (index_only and item.suffix != ".json"):
                    continue
                self.files[item.name] = file = item.resolve()
                if item.suffix != SUFFIX and inside.isdisjoint(file.parents):
                    what = f"{printable(item.name)} is a link to a file outside of the checkpoint"
                    raise self.error(what, "copy the file, or give the folder that it is in")
            self.sizes = {name: file.stat().st_size for name, file in self.files.items()}
        except (OSError, RuntimeError) as error:  # the latter: links in a circle
            what = f"cannot read the folder: {getattr(error, 'strerror', 'links in a circle')}"
            raise CheckpointUnreadableError(what, where=str(self)[:SHOWN]) from None

    @property
    def worthless(self) -> str:
        if (self.path / SIGN).exists():
            return f"it has {SIGN}"
        shards = [file.stat() for name, file in self.files.items() if name.endswith(SUFFIX)]
        size, stored = (sum(s.st_size for s in shards), 512 * sum(s.st_blocks for s in shards))
        if not 0 < stored < size * LEAST_STORED:  # 0: the file system does not say
            return ""
        return f"{stored} of its {size} bytes are on disk"

    def __str__(self) -> str:
        return printable(str(self.path))

    def read(self, name: str, begin: int, end: int) -> bytearray:
        data = bytearray(end - begin)
        try:
            with open_plain(self.files[name]) as file:
                file.seek(begin)
                size = file.readinto(data)
        except (OSError, ValueError) as error:
            remedy = "put the file back, and give the same command again"
            what = getattr(error, "strerror", None) or str(error)
            raise self.error(f"cannot read {name}: {what}", remedy) from None
        if size != len(data):
            raise self.error(f"{name} ends before byte {end}", "fetch it again")
        return data


class HubRepository(CheckpointSource):
    """A repository of the model hub at one commit; HF_ENDPOINT says which hub."""

    def __init__(self, repo: str, revision: str | None = None) -> None:
        """Ask for the file list; HubUnreachableError without an answer, or without access."""
        import truststore  # noqa: PLC0415 - a local inspection needs no network
        from huggingface_hub import HfApi, constants  # noqa: PLC0415

        truststore.inject_into_ssl()
        self.repo = repo
        self._endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT

        def describe() -> tuple[str, dict[str, int]]:
            info: Any = HfApi(endpoint=self._endpoint).repo_info(
                repo, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_S
            )
            return str(info.sha), {i.rfilename: int(i.size or 0) for i in info.siblings or ()}

        self.revision, self.sizes = self._ask(describe)

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:12]} at {self._endpoint}"

    def read(self, name: str, begin: int, end: int) -> bytearray:
        """One range request, repeated at most HUB_RETRIES times."""
        # HfFileSystem would list the repository's folders once more for each file.
        from huggingface_hub import hf_hub_url  # noqa: PLC0415
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # noqa: PLC0415
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        if begin == end:
            return bytearray()

        def fetch() -> bytearray:
            body, limit = bytearray(), time.monotonic() + HUB_LIMIT_S
            with http_stream_backoff(
                "GET",
                hf_hub_url(self.repo, name, revision=self.revision, endpoint=self._endpoint),
                headers={**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"},
                follow_redirects=True,
                timeout=HUB_TIMEOUT_S,
                max_retries=HUB_RETRIES,
            ) as answer:
                hf_raise_for_status(answer)
                # A server that ignores Range sends all of it.
                skip = 0 if answer.status_code == HTTPStatus.PARTIAL_CONTENT else begin
                for piece in answer.iter_bytes():
                    body += piece[skip:]
                    skip = max(0, skip - len(piece))
                    if len(body) >= end - begin:
                        break
                    if time.monotonic() > limit:
                        raise TimeoutError(f"{name} took more than {HUB_LIMIT_S} s")
            return body[: end - begin]

        data: bytearray = self._ask(fetch)
        if len(data) != end - begin:
            raise self.error(f"{name}: expected {end - begin} bytes, got {len(data)}")
        return data

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Call the hub's library; whatever goes wrong on the way is a HubUnreachableError."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

        try:
            return question()
        except (HfHubHTTPError, HFValidationError) as error:
            what = str(error).strip().splitlines()[0]
        except Exception as error:  # noqa: BLE001 - name resolution, certificates, odd answers
            # Its HTTP client has changed twice, and it parses what the hub says without looking.
            what = f"{type(error).__name__}: {error}"
        raise HubUnreachableError(
            f"cannot read {self.repo} from the model hub: {what}",
            where=self._endpoint,
            remedy="set HF_ENDPOINT and HTTPS_PROXY if this host needs them and HF_TOKEN for a "
            "gated repository; or give a folder, or the model.safetensors.index.json alone",
        )


def find_source(name: str) -> CheckpointSource:
    """The source that a user names: a folder, an index file, or ``owner/name[@revision]``."""
    path = Path(name)
    try:
        if (revisions := path / "snapshots").is_dir() and not (path / CONFIG).exists():
            what = "a repository of the Hub's cache, not one of its revisions"
            raise CheckpointUnreadableError(
                what, where=name, remedy=f"give a folder in {revisions}"
            )
        if path.is_dir():
            return Folder(path)
        if path.is_file() and path.name == INDEX:
            return Folder(path.parent, index_only=True)
    except OSError as error:  # a name that is too long, a folder on the way that is locked
        what = f"cannot read it: {error.strerror}"
        raise CheckpointUnreadableError(what, where=name[:SHOWN]) from None
    match = REPOSITORY.fullmatch(name)
    if match is None or path.exists() or name.startswith((".", "/", "~")):
        what = f"{name[:SHOWN]} is not a directory, a {INDEX}, or a Hub repository (owner/name)"
        raise CheckpointUnreadableError(what, remedy="check the path, or give one of those")
    return HubRepository(match["repo"], match["revision"])


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was read of a checkpoint; a leading "model." that vLLM does not need is left out."""

    source: CheckpointSource
    config: dict[str, Any]
    quantization_file: dict[str, Any] | None  # hf_quant_config.json
    names: Mapping[str, str]  # every tensor's name -> shard, from headers, or else from the index
    tensors: Mapping[str, StoredTensor]  # by name; empty when only the index was found
    index: Mapping[str, str] | None  # name -> shard as the index says
    total_size: int | None  # bytes of all tensors as the index says
    missing_shards: tuple[str, ...]  # named by the index and not found

    @classmethod
    def open(cls, where: CheckpointSource | Path | str) -> Self:
        """Read config, index and headers of a source, a folder, or what ``find_source`` takes."""
        if isinstance(where, Path):
            source: CheckpointSource = Folder(where)
        else:
            source = find_source(where) if isinstance(where, str) else where
        for name in source.sizes:  # messages show some
            if not name.isprintable():
                raise source.error(f"invalid file name {name!r}: expected printable characters")
        config, quantization = source.config(), source.json(QUANTIZATION_FILE)
        index = source.json(INDEX)
        weight_map = None if index is None else _weight_map(index, source)
        stored = filter(_is_loaded, source.sizes)
        shards = sorted(set(_numbered(stored) if weight_map is None else weight_map.values()))
        if not shards:
            what = f"no {INDEX} and no *{SUFFIX} in the folder itself"
            raise source.error(what, "convert other formats, or merge the folders of ranks")
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
    def local(self) -> Folder:
        assert isinstance(self.source, Folder)  # noqa: S101 - only inspect takes other sources
        return self.source

    @property
    def shards(self) -> list[str]:
        return sorted(set(self.names.values()))

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
        both = listed & self.tensors.keys()
        moved = {name for name in both if self.index[name] != self.tensors[name].shard}
        return sorted((listed ^ self.tensors.keys()) | moved)


def plain_name(name: str) -> str:
    """Without "model." in front, where vLLM's loaders take a name with and without it.

    They put it there themselves (0.33.0, models/deepseek_v4/nvidia/model.py:1251), and know neither
    ``model.head`` nor ``model.mtp``.
    """
    plain = name.removeprefix("model.")
    return plain if plain.startswith(OPTIONAL) else name


def _is_loaded(shard: str) -> bool:
    """Whether vLLM's pattern, *.safetensors in the folder itself, matches a file."""
    return shard.endswith(SUFFIX) and not shard.startswith(".") and "/" not in shard


def _numbered(shards: Iterable[str]) -> Iterator[str]:
    """Shards, and all that have a name like "model-00001-of-00002.safetensors" beside it."""
    for shard in shards:
        yield shard
        if match := NUMBERED.fullmatch(shard):
            yield from (f"{match[1]}{n:05}{match[2]}" for n in range(1, int(match[3]) + 1))


def _headers(source: CheckpointSource, shards: list[str]) -> dict[str, StoredTensor]:
    total, lock = 0, Lock()

    def count(length: int) -> None:
        nonlocal total
        with lock:
            total += length
        if total > MAX_HEADERS:
            what = f"the headers of all shards have more than {MAX_HEADERS} bytes"
            raise source.error(what, "give a DeepSeek V4 checkpoint")

    with ThreadPoolExecutor(READERS) as pool:
        headers = list(pool.map(lambda shard: read_header(source, shard, count), shards))
    tensors: dict[str, StoredTensor] = {}
    for tensor in (tensor for header in headers for tensor in header):
        name = plain_name(tensor.name)
        if name in tensors:
            what = f"{name} is in {tensors[name].shard} and in {tensor.shard}"
            raise source.error(what, "keep one of the two files, or the index that names its files")
        tensors[name] = tensor
    return tensors


def _weight_map(index: Mapping[str, Any], source: CheckpointSource) -> dict[str, str]:
    rows = index.get("weight_map")
    if not isinstance(rows, dict) or not all(
        isinstance(file, str)
        and file == Path(file).name != ".."
        and file != ""
        and f"{name}{file}".isprintable()
        and len(name) + len(file) <= 2 * MAX_NAME
        for name, file in rows.items()
    ):
        what = f"{INDEX} has no weight_map of tensors to files of its own folder"
        raise source.error(what, "move all shards there, and write a new index of them")
    plain = {plain_name(name): shard for name, shard in rows.items()}
    if len(plain) < len(rows):
        raise source.error(f'{INDEX} has a name both with and without "model." in front')
    return plain
