"""Copy images with skopeo: the very bytes, by digest, so that no tag names them yet.

skopeo finds logins itself (release/transport.py reads the same files), so that no password is in
an argument, which every user of the host could read.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_forge.host import Runner
from vllm_forge.release.registry import Reference, Repository
from vllm_forge.release.transport import is_loopback


def push_layout(
    runner: Runner, layout: Path, reference: Reference, digest: str, *, ca: Path | None = None
) -> None:
    """Copy the one image of an OCI layout to a repository, and read its manifest back.

    Raises CommandFailedError: skopeo failed, also where the layout has another digest.
    """
    with tls_options("dest", reference, ca) as options:
        copy(runner, options, f"oci:{layout}", f"docker://{reference.at(digest)}")
    runner.act("read it back", lambda: Repository(reference, ca=ca).manifest(digest))


def copy(runner: Runner, options: list[str], source: str, target: str) -> None:
    """Let skopeo copy an image; what the target has already is not sent again."""
    runner.run(
        [
            "skopeo", "copy", "--quiet", "--all", "--preserve-digests", "--retry-times=3",
            *options, source, target,
        ]
    )  # fmt: skip


@contextmanager
def tls_options(side: str, reference: Reference, ca: Path | None) -> Iterator[list[str]]:
    """Options of skopeo for one side, ``src`` or ``dest``; see RegistrySession for the rule."""
    if ca is None:
        yield [f"--{side}-tls-verify=false"] if is_loopback(reference.registry) else []
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(ca, Path(folder, "ca.crt"))  # the suffix says what it is
        yield [f"--{side}-cert-dir={folder}"]
