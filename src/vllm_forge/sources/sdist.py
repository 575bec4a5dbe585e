"""Source archives as git trees: the base of the patches.

An archive is imported with ``git fast-import``: no checkout, no filters, no line-ending
rules, so that the tree's hash depends on nothing but the archive's files and their modes.
"""

import gzip
import io
import os
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from vllm_forge.errors import ForgeError
from vllm_forge.host import cache_root, exclusive, remove
from vllm_forge.host.errors import CacheError, CommandFailedError
from vllm_forge.host.files import walk_plain
from vllm_forge.sources.errors import SdistError

UNREADABLE = (
    tarfile.TarError, EOFError, FileNotFoundError, gzip.BadGzipFile, zlib.error, UnicodeError,
)  # fmt: skip
MOST = 2 << 30  # bytes unpacked; vLLM's archives have 0.1
EPOCH_IDENT = "vllm-forge <vllm-forge@localhost> 0 +0000"


def git_env() -> dict[str, str]:
    """Environment in which git reads no configuration of the user or system, but our own."""
    # autocrlf, apply.whitespace, attributes or hooks change what applies, and a tree's hash.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return kept | {
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
        "XDG_CONFIG_HOME": os.devnull,  # git/attributes there is read whatever the rest says
        "LC_ALL": "C",
    }


class SourceRepo:
    """A bare repository with one commit per imported archive, under ``refs/sdist/``."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_root() / "sources.git"

    def git(
        self,
        *args: str,
        stdin: bytes | None = None,
        stream: IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run git with a clean configuration; with ``check``, CommandFailedError if it fails."""
        done = subprocess.run(
            ["git", f"--git-dir={self.path}", *args],
            input=stdin,
            stdin=stream,
            env=git_env() | dict(env or {}),
            capture_output=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise self.failed(args[0], done)
        return done

    def text(self, *args: str, **options: Any) -> str:
        """What git prints; without ``check`` it is empty where git finds nothing."""
        return self.git(*args, **options).stdout.decode(errors="replace").strip()

    def failed(self, command: str, done: subprocess.CompletedProcess[bytes]) -> CommandFailedError:
        stderr = done.stderr.decode(errors="replace").strip()
        what = f"git {command} exited with {done.returncode}: {stderr}"
        remedy = "give write access and space; if it is damaged, delete it: it is made again"
        return CommandFailedError(what, where=self.path, remedy=remedy)

    def unpack(self, tree: str, paths: Sequence[str], folder: Path) -> None:
        """Write files of a tree to a folder."""
        content = self.git("archive", "--format=zip", "-0", tree, *paths).stdout
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            archive.extractall(folder)  # noqa: S202 - a zip, made by git

    @contextmanager
    def mending(self) -> Iterator[None]:
        """Where a step fails and git fsck finds damage: delete the repository, CacheError."""
        try:
            deque(walk_plain(self.path), 0)
        except FileNotFoundError:
            pass
        except ValueError:  # git would wait for what opens a FIFO
            remove(self.path)
        try:
            yield
        except ForgeError as error:
            if not self.path.exists():
                raise
            fsck = self.git("fsck", "--no-dangling", check=False)
            if fsck.returncode == 0 or not self.path.is_relative_to(cache_root()):
                raise
            with exclusive("sources-git", wait=True):
                remove(self.path)
            what = "the repository of source archives was damaged"
            remedy = "it was deleted; run the same command again, which imports them again"
            raise CacheError(what, where=self.path, remedy=remedy) from error

    def forget(self, ref: str) -> None:
        """Let the next ``import_archive`` import again."""
        self.git("update-ref", "-d", f"refs/sdist/{ref}")

    def tree(self, ref: str) -> str | None:
        """Tree hash of an imported archive, None when it is not here yet."""
        if not (self.path / "HEAD").exists():
            return None
        name = f"refs/sdist/{ref}^{{tree}}"
        return self.text("rev-parse", "--verify", "--quiet", name, check=False) or None

    def import_archive(self, ref: str, archive: Path) -> str:
        """Import a .tar.gz, or SdistError; the same archive gives the same tree hash."""
        with exclusive("sources-git", wait=True):
            if (known := self.tree(ref)) is not None:
                return known
            if not (self.path / "HEAD").exists():
                self.git("init", "--quiet", "--bare", "--template=")
            try:
                with tempfile.TemporaryFile(dir=self.path) as stream:
                    _feed(stream, ref, archive)
                    stream.seek(0)
                    # Deltas and zlib's default level make 38 MB of 41, and take most of the time.
                    options = ("-c", "pack.compression=1", "fast-import", "--depth=0", "--quiet")
                    done = self.git(*options, stream=stream, check=False)
            except UNREADABLE as error:
                what = f"not a readable source archive: {error}"
                raise SdistError(what, where=archive) from error
            finally:  # remove what a killed or refused import has left
                for pattern in ("objects/pack/tmp_*", "fast_import_crash_*"):
                    for path in self.path.glob(pattern):
                        path.unlink(missing_ok=True)
            complaint = done.stderr.decode(errors="replace").strip()
            tree = self.tree(ref)
            if complaint or done.returncode != 0 or tree is None:
                raise SdistError(f"git fast-import: {complaint or 'it failed'}", where=archive)
            return tree


def _feed(out: IO[bytes], ref: str, archive: Path) -> None:
    """Write the archive as a fast-import stream, its top folder removed."""
    refused = partial(SdistError, where=archive)
    # "done": a stream that ends early, e.g. because we were killed, makes no ref.
    out.write(
        f"feature done\ncommit refs/sdist/{ref}\ncommitter {EPOCH_IDENT}\ndata 0\n\n".encode()
    )
    top: str | None = None
    files = size = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if ".." in parts or member.name.startswith("/"):
                raise refused(f"a member leaves the archive: {member.name}")
            if not parts:  # "./"
                continue
            top = top or parts[0]
            if parts[0] != top:
                raise refused("more than one folder at the top")
            if member.isdir() or len(parts) == 1:
                continue
            path = "/".join(parts[1:])
            if member.issym():
                mode, data = "120000", member.linkname.encode()
            elif member.isfile():
                size += member.size
                if size > MOST:
                    raise refused(f"more than {MOST} bytes are in it")
                file = tar.extractfile(member)
                assert file is not None  # noqa: S101 - isfile() says so
                mode, data = ("100755" if member.mode & 0o100 else "100644"), file.read()
            else:
                raise refused(f"neither file, folder nor link: {member.name}")
            quoted = path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            out.write(f'M {mode} inline "{quoted}"\ndata {len(data)}\n'.encode())
            out.write(data)
            out.write(b"\n")
            files += 1
    if files == 0:
        raise refused("there is no file in it")
    out.write(b"done\n")
