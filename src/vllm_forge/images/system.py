"""The system image: base plus docker/Dockerfile, built by an engine, kept by its inputs."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.host import Runner, atomic_path, cache_root, remove
from vllm_forge.host.errors import CacheError
from vllm_forge.images.base import BaseRef, compress
from vllm_forge.images.engines import SystemBuild, SystemOutput
from vllm_forge.images.errors import BaseImageError
from vllm_forge.images.layer import LayerBlob
from vllm_forge.images.layout import (
    Image,
    ImageLayer,
    hex_digest,
    read_image,
    read_sealed,
    write_sealed,
)
from vllm_forge.images.prewarm import tree_digest
from vllm_forge.matrix import ImageCell

if TYPE_CHECKING:
    from vllm_forge.images.plan import ImagePlan

# Raise when the kept result changes for equal inputs.
SYSTEM_FORMAT = 3
# Not kept: docker's defaults of a container that never ran, and a host name that it made up.
CONFIG_KEYS = frozenset(
    {"Env", "User", "Entrypoint", "WorkingDir", "Volumes", "ExposedPorts", "Healthcheck"}
)
CA_BUNDLES = (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pki/tls/certs/ca-bundle.crt"))


@dataclass(frozen=True, kw_only=True)
class System:
    """A finished system image: layers (lowest first), config, and Debian's package -> version.

    ``root`` has its files unpacked, with that ``tree_digest``; None when the engine runs images
    itself.
    """

    layers: tuple[ImageLayer, ...]
    config: dict[str, Any]
    debian: dict[str, str]
    root: Path | None
    root_digest: str

    @property
    def digest(self) -> str:
        """SHA-256 over the layers and the config, hex."""
        parts = [layer.blob.digest for layer in self.layers]
        return hashlib.sha256(json.dumps([parts, self.config], sort_keys=True).encode()).hexdigest()


def system_folder(key: str) -> Path:
    """Where the system image of that key is kept."""
    return cache_root() / "systems" / key


def make_system(runner: Runner, plan: ImagePlan, secrets: dict[str, Path]) -> str:
    """Build the system image; return its key."""
    key = plan.system_key
    folder = system_folder(key)
    build = SystemBuild(
        base=plan.base,
        dockerfile=plan.dockerfile,
        args=build_arguments(plan.cell),
        secrets=secrets,
        epoch=plan.cell.base.source_date_epoch,
        work=plan.work / "system",
    )
    runner.act(f"clear {build.work}", lambda: _clear(build.work))
    plan.engine.build_system(runner, build)
    runner.act(
        f"keep the system image in {folder}",
        lambda: _keep(plan.engine.system_output(build), plan.base, folder),
    )
    return key


def host_secrets() -> dict[str, Path]:
    """What of this host the Dockerfile's RUN may read, as id -> file."""
    bundle = next((path for path in CA_BUNDLES if path.exists()), None)
    return {} if bundle is None else {"ca": bundle}


def system_is_kept(key: str) -> bool:
    """Whether the system image of that key is there; a damaged one is made again."""
    try:
        load_system(key)
    except CacheError:
        return False
    return True


def load_system(key: str) -> System:
    """Read a kept system image; ``root_digest`` of its record is that of ``root``, if it has one.

    Raises CacheError: its record is missing or damaged, or the size of a blob differs from it.
    """
    folder = system_folder(key)
    try:
        record = read_sealed(folder / "system.json")
        layers = []
        for row in record["layers"]:
            path = folder / row["path"]
            blob = LayerBlob(**(row["blob"] | {"path": path}))
            if (size := path.stat().st_size) != blob.size:
                raise ValueError(f"{path.name} has {size} bytes, not {blob.size}")  # noqa: TRY301
            layers.append(ImageLayer(blob=blob, created_by=row["created_by"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"not a kept system image: {error}",
            where=str(folder),
            remedy="delete that folder and build again",
        ) from error
    root = folder / "root"
    return System(
        layers=tuple(layers),
        config=record["config"],
        debian=record["debian"],
        root=root if root.exists() else None,
        root_digest=record["root"],
    )


def build_arguments(cell: ImageCell) -> dict[str, str]:
    """Build arguments of docker/Dockerfile."""
    return {
        "PACKAGES": " ".join(sorted(cell.base.packages)),
        "PYTHON": cell.line.python,
        "SOURCE_DATE_EPOCH": str(cell.base.source_date_epoch),
    }


def _clear(folder: Path) -> None:
    remove(folder)
    folder.mkdir(parents=True)


def _keep(output: SystemOutput, base: BaseRef, folder: Path) -> None:
    """Compress the engine's layers; those of our own rootfs are taken as they are."""
    rootfs = None if base.layout is None else _rootfs_blob(read_image(base.layout))
    with atomic_path(folder) as aside:
        aside.mkdir()
        rows = []
        for number, (tar, diff_id) in enumerate(zip(output.tars, output.diff_ids, strict=True)):
            name = f"{number}.tar.gz"
            if rootfs is not None and rootfs.diff_id == diff_id:
                # Linked: refreshing the rootfs leaves this system image whole.
                (aside / name).hardlink_to(rootfs.path)
                blob = rootfs
            else:  # buildx rewrites the times in our rootfs too
                plain = aside / "plain.tar"
                write_plain(tar, plain)
                blob = compress(plain, aside / name)
                plain.unlink()
            source = "rootfs" if rootfs is not None and number == 0 else "docker/Dockerfile"
            row = {"path": name, "created_by": f"vllm-forge: {source}"}
            rows.append(row | {"blob": asdict(blob) | {"path": name}})
        config = {key: value for key, value in output.config.items() if key in CONFIG_KEYS}
        record = {"layers": rows, "config": config, "debian": _debian_packages(output.tars)}
        if output.root is not None:
            output.root.rename(aside / "root")
        write_sealed(aside / "system.json", record | {"root": tree_digest(aside / "root")})


def write_plain(source: Path, target: Path) -> None:
    """Write a layer's tar again, without what depends on who built it.

    A rootless engine adds the attributes of its overlay (``user.overlay.*``), which other hosts
    refuse to set; user and group count by number.
    """
    with (
        tarfile.open(source) as layer,
        tarfile.open(target, "w", format=tarfile.PAX_FORMAT, encoding="utf-8") as plain,
    ):
        for member in layer:
            member.pax_headers = {}
            member.uname = member.gname = ""
            member.mtime = int(member.mtime)
            plain.addfile(member, layer.extractfile(member) if member.isreg() else None)


def _rootfs_blob(rootfs: Image) -> LayerBlob:
    (layer,) = rootfs.manifest["layers"]
    (diff_id,) = rootfs.config["rootfs"]["diff_ids"]
    return LayerBlob(
        path=rootfs.blob(layer["digest"]),
        digest=hex_digest(layer["digest"]),
        diff_id=hex_digest(diff_id),
        size=layer["size"],
    )


def _debian_packages(tars: Sequence[Path]) -> dict[str, str]:
    """Package -> version, from the dpkg status file of the highest layer that has one."""
    for path in reversed(tars):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.removeprefix("./") == "var/lib/dpkg/status":
                    file = tar.extractfile(member)
                    assert file is not None  # noqa: S101 - it is a regular file
                    return _parse_status(file.read().decode())
    raise BaseImageError(
        "the base is not a Debian system: it has no dpkg status file",
        remedy="use --base rootfs, or a Debian image",
    )


def _parse_status(text: str) -> dict[str, str]:
    packages = {}
    for paragraph in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line[:40])
        if fields.get("Status", "").endswith(" installed"):
            packages[fields["Package"]] = fields["Version"]
    return packages
