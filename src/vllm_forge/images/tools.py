"""Install the tools of builds and tests with apt."""

import os

from vllm_forge.host import Runner, which
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.images.errors import ProvisionError

PACKAGES = ("buildah", "runc", "skopeo", "mmdebstrap")
# Tool -> its package: of the tests, and of `--archive` for a squashfs.
MORE = {
    "docker-registry": "docker-registry", "mksquashfs": "squashfs-tools", "nix": "nix-bin",
    "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge",
    "busybox": "busybox-static",
}  # fmt: skip
APT = "apt-get install --no-install-recommends"
INSTALL = f"{APT} {' '.join(PACKAGES)}"


def provision(runner: Runner, *, registry: bool = False) -> None:
    """Install missing tools by apt-get, as root; ``registry``: also what the tests need."""
    tools = dict(zip(PACKAGES, PACKAGES, strict=True)) | (MORE if registry else {})
    missing = [package for tool, package in tools.items() if which(tool) is None]
    if not missing:
        return
    if which("apt-get") is None or os.geteuid() != 0:
        what = f"missing: {', '.join(missing)}; --provision needs root and apt-get"
        raise ProvisionError(
            what, remedy=f"on Debian or Ubuntu, as root: {APT} {' '.join(missing)}"
        )
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "-qq", "install", "--yes", "--no-install-recommends", *missing]
    try:
        runner.run(["apt-get", "-qq", "update"], env=env)
        runner.run(install, env=env)
    except CommandFailedError as error:
        what = f"apt-get could not install {', '.join(missing)}:\n{error.what}"
        remedy = "see its output: wait for another apt or dpkg, or correct the host's apt sources"
        raise ProvisionError(what, where=error.where, remedy=remedy) from error
