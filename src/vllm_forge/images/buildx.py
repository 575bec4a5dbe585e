"""The docker engine: buildx builds, the daemon runs."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from vllm_forge.images.engine import SystemOutput, require_version, tagged
from vllm_forge.images.errors import EngineSetupError, LayoutError

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.host import Runner
    from vllm_forge.images.engine import SystemBuild, Trial

# 25 is the first that loads an OCI layout; its buildx (0.12) knows rewrite-timestamp.
OLDEST_DOCKER = (25, 0)
OLDEST_BUILDX = (0, 12)


class Buildx:
    """See engine.Engine."""

    name = "docker"
    tools: tuple[str, ...] = ("docker",)

    def check(self, runner: Runner) -> None:
        """Client, plugin and a daemon that answers."""
        server = runner.run(["docker", "version", "--format={{.Server.Version}}"])
        plugin = runner.run(["docker", "buildx", "version"])
        store = runner.run(["docker", "info", "--format={{json .DriverStatus}}"])
        if store and "io.containerd.snapshotter" not in store:
            raise EngineSetupError(
                "docker uses its classic image store, from which buildx exports no OCI layout",
                where=store.strip(),
                remedy='set {"features": {"containerd-snapshotter": true}} in daemon.json and '
                "restart docker, or choose --engine buildah",
            )
        if server:
            require_version(server, OLDEST_DOCKER, "docker")
        if plugin:
            found = re.search(r"v?(\d+\.\d+\.\d+)", plugin)
            require_version(found[1] if found else "", OLDEST_BUILDX, "docker buildx")

    def build_system(self, runner: Runner, build: SystemBuild) -> None:
        """One ``docker buildx build`` into an OCI layout of plain tars.

        Not pushed from here: rewrite-timestamp and unpacking exclude each other on the
        docker driver. Provenance is ours to state, and would change the digest.
        """
        if build.base.layout is not None:
            base = [
                "--build-arg=BASE=base",
                f"--build-context=base=oci-layout://{build.base.layout}:rootfs",
            ]
        else:
            base = [f"--build-arg=BASE={build.base.image}"]
        output = (
            f"type=oci,tar=false,dest={build.work / 'image'},rewrite-timestamp=true,"
            "compression=uncompressed,force-compression=true"
        )
        runner.run(
            [
                "docker", "buildx", "build", "--quiet", "--no-cache", "--network=host",
                "--provenance=false", f"--file={build.dockerfile}", *base,
                *tagged(list(build.args.items()), "--build-arg"),
                *(f"--secret=id={name},src={path}" for name, path in build.secrets.items()),
                f"--output={output}", str(build.dockerfile.parent),
            ],
            env={"SOURCE_DATE_EPOCH": str(build.epoch)},
        )  # fmt: skip

    def system_output(self, build: SystemBuild) -> SystemOutput:
        """Parse the OCI layout."""
        blobs = build.work / "image" / "blobs" / "sha256"
        index = json.loads((build.work / "image" / "index.json").read_text())
        manifest = json.loads((blobs / _hex(index["manifests"][0]["digest"])).read_text())
        config = json.loads((blobs / _hex(manifest["config"]["digest"])).read_text())
        for layer in manifest["layers"]:
            if not layer["mediaType"].endswith(".tar"):
                raise LayoutError(
                    f"buildx left a compressed layer: {layer['mediaType']}", where=str(build.work)
                )
        return SystemOutput(
            tars=tuple(blobs / _hex(layer["digest"]) for layer in manifest["layers"]),
            diff_ids=tuple(_hex(item) for item in config["rootfs"]["diff_ids"]),
            config=config["config"],
            root=None,
        )

    def try_image(self, runner: Runner, trial: Trial) -> str:
        """Load the image, then ``docker run`` with as few rights as there are."""
        self.load(runner, trial.image.path, trial.name)
        output = runner.run(
            [
                "docker", "run", "--rm", "--network=none", "--read-only", "--cap-drop=ALL",
                "--security-opt=no-new-privileges", "--tmpfs=/tmp:exec,mode=1777",
                "--tmpfs=/cache:exec,uid=10001,gid=10001",
                f"--volume={trial.inputs.resolve()}:/mnt:ro",
                f"--entrypoint={trial.argv[0]}", trial.name, *trial.argv[1:],
            ]
        )  # fmt: skip
        runner.run(["docker", "image", "rm", "--force", trial.name])
        return output

    def load(self, runner: Runner, layout: Path, name: str) -> None:
        """``docker load`` reads a tar, and takes the name from the layout's index."""
        del name
        script = 'tar -C "$0" -cf - . | docker load --quiet'
        runner.run(["bash", "-o", "pipefail", "-ec", script, str(layout)])


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
