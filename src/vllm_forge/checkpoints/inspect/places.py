"""Where a checkpoint is: a folder, an index file alone, or a repository of the model hub.

A place gives its files and byte ranges of them; what they mean is not its concern.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.errors import CheckpointUnreadableError, HubUnreachableError
from vllm_forge.checkpoints.shards import INDEX
from vllm_forge.checkpoints.spans import MAX_TEXT
from vllm_forge.host import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

REPOSITORY = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
HUB_TIMEOUT_S = 30.0
SHOWN = 200  # characters of a place


class Place(ABC):
    """A checkpoint's files. ``sizes``: file name -> bytes."""

    sizes: Mapping[str, int]

    @abstractmethod
    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes ``begin`` to ``end`` of a file; exactly as many.

        Raises:
            CheckpointUnreadableError: the file is shorter.
            HubUnreachableError: the hub stopped answering.
        """

    def text(self, name: str) -> str | None:
        """A small file in whole, None if there is none.

        Raises:
            CheckpointUnreadableError: it is not UTF-8, or longer than any such file.
        """
        if name not in self.sizes:
            return None
        if self.sizes[name] > MAX_TEXT:
            raise CheckpointUnreadableError(
                f"{name} has {self.sizes[name]} bytes, more than {MAX_TEXT}", where=str(self)
            )
        try:
            return self.read(name, 0, self.sizes[name]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointUnreadableError(
                f"{name} is not UTF-8: {error}", where=str(self)
            ) from None


@dataclass(frozen=True)
class Folder(Place):
    """A local folder, or some files of it."""

    path: Path
    sizes: Mapping[str, int] = field(init=False)
    index_only: bool = False

    def __post_init__(self) -> None:
        """Look once: what is here now is what is inspected."""
        try:
            sizes = {
                item.name: item.stat().st_size
                for item in self.path.iterdir()
                if item.is_file() and not (self.index_only and item.suffix == ".safetensors")
            }
        except OSError as error:
            raise CheckpointUnreadableError(
                f"the folder cannot be read: {error.strerror}", where=str(self.path)
            ) from None
        object.__setattr__(self, "sizes", sizes)

    def __str__(self) -> str:
        """For messages."""
        return printable(str(self.path))

    def read(self, name: str, begin: int, end: int) -> bytes:
        """See Place.read."""
        try:
            with (self.path / name).open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), end - begin, begin)
        except OSError as error:
            raise CheckpointUnreadableError(
                f"{name} cannot be read: {error.strerror}", where=str(self.path)
            ) from None
        if len(data) != end - begin:
            raise CheckpointUnreadableError(
                f"{name} ends before byte {end}", where=str(self.path), remedy="fetch it again"
            )
        return data


class HubRepository(Place):
    """A repository of the model hub at one commit; HF_ENDPOINT says which hub."""

    def __init__(self, repo: str, revision: str | None = None) -> None:
        """Ask for the file list.

        Raises:
            HubUnreachableError: no answer, no such repository, or no access to it.
        """
        import truststore  # noqa: PLC0415 - a local inspection needs no network
        from huggingface_hub import HfApi, constants  # noqa: PLC0415

        truststore.inject_into_ssl()
        self.repo = repo
        self._endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        info: Any = self._ask(
            lambda: HfApi(endpoint=self._endpoint).repo_info(
                repo, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_S
            )
        )
        self.revision: str = info.sha
        self.sizes = {item.rfilename: item.size or 0 for item in info.siblings or ()}

    def __str__(self) -> str:
        """For messages."""
        return f"{self.repo}@{self.revision[:12]} at {self._endpoint}"

    def read(self, name: str, begin: int, end: int) -> bytes:
        """See Place.read; one range request."""
        from huggingface_hub import hf_hub_url  # noqa: PLC0415
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # noqa: PLC0415
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        if begin == end:
            return b""

        def fetch() -> bytes:
            answer = http_backoff(
                "GET",
                hf_hub_url(self.repo, name, revision=self.revision, endpoint=self._endpoint),
                headers={**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"},
                follow_redirects=True,
                timeout=HUB_TIMEOUT_S,
                max_retries=2,
            )
            hf_raise_for_status(answer)
            body: bytes = answer.content
            # A server that ignores Range sends all of it.
            return body if answer.status_code == RANGE_ANSWERED else body[begin:end]

        data: bytes = self._ask(fetch)
        if len(data) != end - begin:
            raise CheckpointUnreadableError(
                f"{name}: {len(data)} bytes came instead of {end - begin}", where=str(self)
            )
        return data

    def _ask(self, question: Any) -> Any:
        """Call the hub's library; whatever goes wrong on the way is one error of ours."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

        try:
            return question()
        except (HfHubHTTPError, HFValidationError) as error:
            what = str(error).strip().splitlines()[0]
        except OSError as error:  # connection, name resolution, certificates
            what = f"{type(error).__name__}: {error}"
        except Exception as error:
            # Its HTTP client has changed twice; its errors have one root per client.
            if type(error).__module__.partition(".")[0] not in {"httpx", "httpx2", "httpcore"}:
                raise
            what = f"{type(error).__name__}: {error}"
        raise HubUnreachableError(
            f"the model hub does not give {self.repo}: {what}",
            where=self._endpoint,
            remedy="set HF_ENDPOINT and HTTPS_PROXY if this host needs them and HF_TOKEN for a "
            "gated repository; or give a folder, or the model.safetensors.index.json alone",
        )


RANGE_ANSWERED = 206


def find_place(wanted: str) -> Place:
    """The place that a person means: a folder, an index file, or ``owner/name[@revision]``.

    Raises:
        CheckpointUnreadableError: neither is there nor can be the name of a repository.
        HubUnreachableError: it can be, but the hub does not give it.
    """
    path = Path(wanted)
    try:
        if path.is_dir():
            return Folder(path)
        if path.is_file() and path.name == INDEX:
            return Folder(path.parent, index_only=True)
    except OSError as error:  # a name that is too long, a folder on the way that is locked
        raise CheckpointUnreadableError(
            f"it cannot be looked at: {error.strerror}", where=wanted[:SHOWN]
        ) from None
    match = REPOSITORY.fullmatch(wanted)
    if match is None or path.exists() or wanted.startswith((".", "/", "~")):
        raise CheckpointUnreadableError(
            f"{wanted[:SHOWN]} is no folder, no {INDEX} and no owner/name of the model hub",
            remedy="give one of those",
        )
    return HubRepository(match["repo"], match["revision"])
