"""What is mounted below a folder: a container tool that was killed leaves it so."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from vllm_forge.host.errors import MountedError

TABLE = Path("/proc/self/mountinfo")
OCTAL = re.compile(r"\\(\d{3})")


def mounted_below(folder: Path, table: str | None = None) -> list[Path]:
    """Mount points within ``folder``, the latest first, as they have to be unmounted.

    Args:
        folder: need not exist; it may be a mount point itself, which does not count.
        table: the text of /proc/self/mountinfo (proc_pid_mountinfo(5)); default: this process's.
    """
    rows = (TABLE.read_text() if table is None else table).splitlines()
    points = [Path(OCTAL.sub(lambda m: chr(int(m[1], 8)), row.split()[4])) for row in rows]
    top = folder.resolve()
    return [point for point in reversed(points) if top in point.parents]


def unmount_below(folder: Path) -> None:
    """Unmount all of it.

    Raises:
        MountedError: something is in use, or this user may not.
    """
    for point in mounted_below(folder):
        done = subprocess.run(["umount", str(point)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise MountedError(
                f"a file system is mounted there, and umount says: {done.stderr.strip()}",
                where=str(point),
                remedy="end what uses it, or unmount it as root; a killed build leaves such mounts",
            )
