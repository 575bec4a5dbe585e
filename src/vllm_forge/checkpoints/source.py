"""Where a checkpoint is: a folder, an index file alone, or a repository of the model hub.

A source gives its files and byte ranges of them; it does not interpret them.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.errors import CheckpointUnreadableError, HubUnreachableError
from vllm_forge.checkpoints.tensors import CONFIG, INDEX, strict_json
from vllm_forge.host import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_TEXT = 1 << 28  # bytes of a JSON file; a manifest.json of 135,000 tensors has 3e7
REPOSITORY = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
HUB_TIMEOUT_S = 30.0
HUB_RETRIES = 2  # of a range, after a lost connection, a 429 or a 5xx
SHOWN = 200  # characters of a name that the user gave


class CheckpointSource(ABC):
    """A checkpoint's files. ``sizes``: file name -> bytes."""

    sizes: Mapping[str, int]

    @abstractmethod
    def read(self, name: str, begin: int, end: int) -> bytes | bytearray:
        """Bytes ``begin`` to ``end`` of a file; exactly as many.

        Raises:
            CheckpointUnreadableError: the file is shorter, or gone.
            HubUnreachableError: the hub stopped answering.
        """

    def text(self, name: str) -> str | None:
        """A whole small file, None if there is none.

        Raises:
            CheckpointUnreadableError: it is not UTF-8, or longer than MAX_TEXT.
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

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object, None if there is no such file.

        Raises:
            CheckpointUnreadableError: malformed, or not an object.
        """
        if (text := self.text(name)) is None:
            return None
        try:
            value = strict_json(text)
        except ValueError as error:
            raise CheckpointUnreadableError(
                f"{name} is not JSON: {error}", where=str(self)
            ) from None
        if not isinstance(value, dict):
            raise CheckpointUnreadableError(f"{name} is not a JSON object", where=str(self))
        return value

    def config(self) -> dict[str, Any]:
        """config.json.

        Raises:
            CheckpointUnreadableError: missing, or see ``json``.
        """
        config = self.json(CONFIG)
        if config is None:
            raise CheckpointUnreadableError(
                f"missing {CONFIG}", where=str(self), remedy="take it from the model's repository"
            )
        return config


@dataclass(frozen=True)
class Folder(CheckpointSource):
    """A local folder, or some files of it; listed once, when it is opened."""

    path: Path
    sizes: Mapping[str, int] = field(init=False)
    index_only: bool = False

    def __post_init__(self) -> None:
        """List the regular files.

        Raises:
            CheckpointUnreadableError: not a folder, or one that may not be read.
        """
        try:
            sizes = {
                item.name: item.stat().st_size
                for item in self.path.iterdir()
                if item.is_file() and not (self.index_only and item.suffix == ".safetensors")
            }
        except OSError as error:
            raise CheckpointUnreadableError(
                f"cannot read the folder: {error.strerror}", where=str(self)[:SHOWN]
            ) from None
        object.__setattr__(self, "sizes", sizes)

    def __str__(self) -> str:
        """For messages."""
        return printable(str(self.path))

    def read(self, name: str, begin: int, end: int) -> bytearray:
        """See CheckpointSource.read."""
        data = bytearray(end - begin)
        try:
            with (self.path / name).open("rb") as file:
                file.seek(begin)
                size = file.readinto(data)
        except OSError as error:
            raise CheckpointUnreadableError(
                f"cannot read {name}: {error.strerror}",
                where=str(self),
                remedy="put the file back, and give the same command again",
            ) from None
        if size != len(data):
            raise CheckpointUnreadableError(
                f"{name} ends before byte {end}", where=str(self), remedy="fetch it again"
            )
        return data


class HubRepository(CheckpointSource):
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
        """See CheckpointSource.read; one range request, repeated at most HUB_RETRIES times."""
        # HfFileSystem would list the repository's folders once more for each file.
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
                max_retries=HUB_RETRIES,
            )
            hf_raise_for_status(answer)
            body: bytes = answer.content
            # A server that ignores Range sends all of it.
            return body if answer.status_code == HTTPStatus.PARTIAL_CONTENT else body[begin:end]

        data: bytes = self._ask(fetch)
        if len(data) != end - begin:
            raise CheckpointUnreadableError(
                f"{name}: expected {end - begin} bytes, got {len(data)}", where=str(self)
            )
        return data

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Call the hub's library; whatever goes wrong on the way is a HubUnreachableError."""
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
            f"cannot read {self.repo} from the model hub: {what}",
            where=self._endpoint,
            remedy="set HF_ENDPOINT and HTTPS_PROXY if this host needs them and HF_TOKEN for a "
            "gated repository; or give a folder, or the model.safetensors.index.json alone",
        )


def find_source(name: str) -> CheckpointSource:
    """The source that a user names: a folder, an index file, or ``owner/name[@revision]``.

    Raises:
        CheckpointUnreadableError: it is none of these.
        HubUnreachableError: it can be a repository, but the hub does not give it.
    """
    path = Path(name)
    try:
        if path.is_dir():
            return Folder(path)
        if path.is_file() and path.name == INDEX:
            return Folder(path.parent, index_only=True)
    except OSError as error:  # a name that is too long, a folder on the way that is locked
        raise CheckpointUnreadableError(
            f"cannot read it: {error.strerror}", where=name[:SHOWN]
        ) from None
    match = REPOSITORY.fullmatch(name)
    if match is None or path.exists() or name.startswith((".", "/", "~")):
        raise CheckpointUnreadableError(
            f"{name[:SHOWN]} is not a directory, a {INDEX}, or a Hub repository (owner/name)",
            remedy="check the path, or give one of those",
        )
    return HubRepository(match["repo"], match["revision"])
