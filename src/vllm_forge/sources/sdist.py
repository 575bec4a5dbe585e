"""Source archives as git trees: the ground that patches stand on.

An archive is imported with ``git fast-import``: no checkout, no filters, no line-ending
rules, so that the tree's hash depends on nothing but the archive's files and their modes.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from vllm_forge.errors import CommandFailedError, SdistError
from vllm_forge.host import cache_root, exclusive

if TYPE_CHECKING:
    from collections.abc import Mapping

EPOCH_IDENT = "vllm-forge <vllm-forge@localhost> 0 +0000"


def git_env() -> dict[str, str]:
    """Environment in which git reads no configuration but our own.

    User or system settings (autocrlf, apply.whitespace, attributes, hooks) would change
    what applies and what a tree's hash is.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return kept | {
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_ATTR_NOSYSTEM": "1",
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
        env: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run git on this repository with a clean configuration.

        Raises:
            CommandFailedError: a non-zero exit, when ``check`` is set.
        """
        done = subprocess.run(
            ["git", f"--git-dir={self.path}", *args],
            input=stdin,
            env=git_env() | dict(env or {}),
            capture_output=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise CommandFailedError(
                f"git {args[0]} exited with {done.returncode}: "
                f"{done.stderr.decode(errors='replace').strip()}",
                where=str(self.path),
            )
        return done

    def tree(self, ref: str) -> str | None:
        """Tree hash of an imported archive, None when it is not here yet."""
        if not (self.path / "HEAD").exists():
            return None
        done = self.git(
            "rev-parse", "--verify", "--quiet", f"refs/sdist/{ref}^{{tree}}", check=False
        )
        return done.stdout.decode().strip() or None

    def import_archive(self, ref: str, archive: Path) -> str:
        """Import a .tar.gz; return the tree hash. The same archive gives the same hash.

        Raises:
            SdistError: not a tar archive, or not one folder at its top, or a path leaves it.
        """
        with exclusive("sources-git", wait=True):
            if (known := self.tree(ref)) is not None:
                return known
            if not (self.path / "HEAD").exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(
                    ["git", "init", "--quiet", "--bare", str(self.path)],
                    env=git_env(),
                    check=True,
                    capture_output=True,
                )
            importer = subprocess.Popen(
                ["git", f"--git-dir={self.path}", "fast-import", "--quiet"],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=git_env(),
            )
            try:
                assert importer.stdin is not None  # noqa: S101 - PIPE was asked for
                _feed(importer.stdin, ref, archive)
                importer.stdin.close()
            except (tarfile.TarError, EOFError, OSError) as error:
                importer.kill()
                raise SdistError(
                    f"not a readable source archive: {error}", where=str(archive)
                ) from error
            finally:
                importer.wait()
            tree = self.tree(ref)
            if importer.returncode != 0 or tree is None:
                message = importer.stderr.read().decode() if importer.stderr else ""
                raise SdistError(f"git fast-import: {message.strip()}", where=str(archive))
            return tree


def _feed(out: IO[bytes], ref: str, archive: Path) -> None:
    """Write the archive as a fast-import stream, its top folder removed."""
    out.write(f"commit refs/sdist/{ref}\ncommitter {EPOCH_IDENT}\ndata 0\n\n".encode())
    top: str | None = None
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if ".." in parts or member.name.startswith("/"):
                raise SdistError(f"a member leaves the archive: {member.name}", where=str(archive))
            top = top or parts[0]
            if parts[0] != top:
                raise SdistError("more than one folder at the top", where=str(archive))
            if member.isdir() or len(parts) == 1:
                continue
            path = "/".join(parts[1:])
            if member.issym():
                mode, data = "120000", member.linkname.encode()
            elif member.isfile():
                file = tar.extractfile(member)
                assert file is not None  # noqa: S101 - isfile() says so
                mode, data = ("100755" if member.mode & 0o100 else "100644"), file.read()
            else:
                raise SdistError(
                    f"neither file, folder nor link: {member.name}", where=str(archive)
                )
            quoted = path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            out.write(f'M {mode} inline "{quoted}"\ndata {len(data)}\n'.encode())
            out.write(data)
            out.write(b"\n")
