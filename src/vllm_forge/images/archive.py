"""An image as one file, for hosts without a registry.

A tar is what `docker save` writes since version 25: the OCI layout, and beside it the list of
layers that older stores of docker read (https://github.com/moby/moby, image/tarexport). A squashfs,
which enroot and Apptainer run, has all layers as one file system, and the files by which enroot
starts an image (https://github.com/NVIDIA/enroot, doc/image-format.md).
"""

import io
import json
import shlex
import subprocess
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from vllm_forge.errors import UsageError
from vllm_forge.host import Runner, require_writable, which
from vllm_forge.host.errors import CommandFailedError, ToolMissingError
from vllm_forge.images.errors import LayoutError
from vllm_forge.images.layer import members, overlay, plain_path
from vllm_forge.images.layout import Image, read_image

KINDS = (".tar", ".sqsh", ".squashfs")
# sqfstar would do, but Debian 12's takes no -X options. The root folder, which no tar can state,
# has mode 0777 and the present time unless asked: before squashfs-tools 4.6, only by -all-time.
MKSQUASHFS = ("mksquashfs", "-", "FILE", "-tar", "-noappend", "-quiet", "-no-progress",
              "-comp", "zstd", "-Xcompression-level", "3", "-root-mode", "0755")  # fmt: skip
TIMES = ("-mkfs-time", "-all-time")


def require_archive(path: Path, *, dry_run: bool) -> None:
    """Refuse at once what would fail after a build.

    UsageError: the name does not say what the file shall become; FileAccessError, ToolMissingError.
    """
    if not path.name.endswith(KINDS):
        what = f"invalid --archive {path.name!r}: expected a name that ends in {', '.join(KINDS)}"
        raise UsageError(what)
    if dry_run:
        return
    require_writable(path.parent)
    if not path.name.endswith(".tar") and which(MKSQUASHFS[0]) is None:
        what = f"{MKSQUASHFS[0]} is not installed; a squashfs needs it"
        remedy = "on Debian or Ubuntu, as root: apt-get install squashfs-tools"
        raise ToolMissingError(what, remedy=remedy)


def write_archive(runner: Runner, layout: Path, name: str, target: Path, epoch: int) -> None:
    """Write a layout's image to one file, which replaces an older one when it is complete."""
    aside = target.with_name(f".{target.name}.new")
    words = [*MKSQUASHFS, *(word for option in TIMES for word in (option, str(epoch)))]
    argv = [str(aside) if word == "FILE" else word for word in words]
    runner.run(["rm", "--force", str(aside)])
    if target.name.endswith(".tar"):
        what = f"write {layout} as a tar to {aside}"
        runner.act(what, lambda: _write_tar(read_image(layout), name, aside, epoch))
    else:
        what = f"write all layers of {layout} as one tar to: {shlex.join(argv)}"
        runner.act(what, lambda: _write_squashfs(read_image(layout), argv))
    runner.run(["mv", "--force", str(aside), str(target)])


def _write_tar(image: Image, name: str, target: Path, epoch: int) -> None:
    blobs = [f"blobs/sha256/{layer.blob.digest}" for layer in image.layers]
    config = "blobs/" + image.manifest["config"]["digest"].replace(":", "/")
    listing = [{"Config": config, "RepoTags": [name], "Layers": blobs}]

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mtime, info.mode = epoch, 0o755 if info.isdir() else 0o644
        return info

    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(image.path.iterdir()):
            tar.add(path, path.name, filter=plain)
        content = json.dumps(listing).encode()
        tar.addfile(_entry("manifest.json", content, epoch), io.BytesIO(content))


def _entry(path: str, content: bytes, epoch: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.size, info.mtime = len(content), epoch
    return info


def _write_squashfs(image: Image, argv: list[str]) -> None:
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=errors, bufsize=0) as process,
    ):
        assert process.stdin is not None  # noqa: S101
        read = False
        with process.stdin, suppress(BrokenPipeError):  # then it ended early, whatever it says
            write_merged(image, process.stdin, int(argv[-1]))
            read = True
        if process.wait() or not read:
            errors.seek(0)
            what = f"{argv[0]} exited with {process.returncode}: {errors.read().decode()[-2000:]}"
            raise CommandFailedError(what, where=shlex.join(argv))


def write_merged(image: Image, out: IO[bytes], epoch: int) -> None:
    """Write one tar of an image's files, folders first. Same image, same bytes.

    Raises LayoutError: a hard link leads to a file that a higher layer replaces.
    """
    blobs = [layer.blob for layer in image.layers]
    owners = overlay(blobs, lambda _path, info, _tar: info)
    added = enroot_files(image.config["config"])
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        for path in sorted(path for path, (_, info) in owners.items() if info.isdir()):
            tar.addfile(owners[path][1])
        for number, blob in enumerate(blobs):
            for path, info, layer in members(blob):
                if owners.get(path, (None,))[0] != number or info.isdir() or path in added:
                    continue
                if info.islnk() and owners.get(plain_path(info.linkname), (None,))[0] != number:
                    what = f"/{path} is a hard link to a file that a higher layer replaces"
                    raise LayoutError(what, where=image.path)
                tar.addfile(info, layer.extractfile(info) if info.isreg() else None)
        for path, content in sorted(added.items()):
            tar.addfile(_entry(path, content, epoch), io.BytesIO(content))


def enroot_files(config: dict[str, Any]) -> dict[str, bytes]:
    """Files by which enroot starts an image; ``config``: the ``config`` object of the image."""
    folder = config["WorkingDir"]
    mounts = [
        f"${{ENROOT_ROOTFS}}{path} {path} none x-create=dir,bind,rw,nosuid,nodev"
        for path in sorted(config["Volumes"])
    ]
    start = [f"cd {shlex.quote(folder)} || exit 1", f'exec {shlex.join(config["Entrypoint"])} "$@"']
    files = {"etc/rc": start, "etc/fstab": mounts, "etc/environment": config["Env"]}
    return {path: "".join(f"{line}\n" for line in lines).encode() for path, lines in files.items()}
