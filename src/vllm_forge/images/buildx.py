"""The docker engine: buildx builds, the daemon runs; see docker_api.py for what the SDK does."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING

from vllm_forge.host import which
from vllm_forge.images.docker_api import answers, check_daemon
from vllm_forge.images.engine import build_options, hex_digest, read_output, require_version
from vllm_forge.images.errors import LayoutError

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.host import Runner
    from vllm_forge.images.engine import ContainerRun, SystemBuild, SystemOutput

OLDEST_BUILDX = (0, 12)  # the first that knows rewrite-timestamp


class Buildx:
    """See engine.Engine."""

    name = "docker"
    tools: tuple[str, ...] = ("docker",)

    def present(self) -> bool:
        """Client, plugin and a daemon that answers: a client alone does not build."""
        if which("docker") is None or not answers():
            return False
        plugin = ["docker", "buildx", "version"]
        return subprocess.run(plugin, capture_output=True, check=False).returncode == 0

    def check(self, runner: Runner) -> None:
        """A daemon that answers, with containerd's image store, and the plugin."""
        runner.act("check the docker daemon's version and image store", check_daemon)
        if plugin := runner.run(["docker", "buildx", "version"]):
            version = re.search(r"v?(\d+\.\d+\.\d+)", plugin)
            require_version(version[1] if version else "", OLDEST_BUILDX, "docker buildx")

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
                *build_options(build), f"--output={output}", str(build.dockerfile.parent),
            ],
            env={"SOURCE_DATE_EPOCH": str(build.epoch)},
        )  # fmt: skip

    def system_output(self, build: SystemBuild) -> SystemOutput:
        """Parse the OCI layout."""
        blobs = build.work / "image" / "blobs" / "sha256"
        index = json.loads((build.work / "image" / "index.json").read_text())
        manifest = json.loads((blobs / hex_digest(index["manifests"][0]["digest"])).read_text())
        for layer in manifest["layers"]:
            if not layer["mediaType"].endswith(".tar"):
                raise LayoutError(
                    f"buildx left a compressed layer: {layer['mediaType']}", where=str(build.work)
                )
        return read_output(blobs, manifest, None)

    def run_in_image(self, runner: Runner, run: ContainerRun) -> str:
        """Load the image, then ``docker run`` with as few rights as there are."""
        self.load(runner, run.layout, run.name)
        user = [f"--user={run.user}"] if run.user else []
        output = runner.run(
            [
                "docker", "run", "--rm", "--network=none", "--read-only", "--cap-drop=ALL",
                "--security-opt=no-new-privileges", "--tmpfs=/tmp:exec,mode=1777",
                "--tmpfs=/cache:exec,uid=10001,gid=0,mode=0775", *user,
                f"--volume={run.inputs.resolve()}:/mnt:ro",
                f"--entrypoint={run.argv[0]}", run.name, *run.argv[1:],
            ]
        )  # fmt: skip
        runner.run(["docker", "image", "rm", "--force", run.name])
        return output

    def load(self, runner: Runner, layout: Path, name: str) -> None:
        """``docker load`` reads a tar, and takes the name from the layout's index."""
        del name
        script = 'tar -C "$0" -cf - . | docker load --quiet'
        runner.run(["bash", "-o", "pipefail", "-ec", script, str(layout)])
