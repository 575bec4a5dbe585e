"""Run a command as a user without rights who may use a range of subordinate ids.

Root makes the user in a mount namespace of the command's own: its /etc/passwd, /etc/subuid and
/etc/subgid, and no file of the host is changed. Root's home is hidden there but for the Python that
runs the tests.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

UID = 4000
NAME = "joe"
RANGE = f"{NAME}:200000:65536\n"
FILES = {"subuid": RANGE, "subgid": RANGE}
SCRIPT = """
files=$1 python=$2 uid=$3; shift 3
mkdir "$files/python"
mount --bind "$python" "$files/python"
mount -t tmpfs -o mode=755 tmpfs /root
mkdir -p "$python"
mount --bind "$files/python" "$python"
for name in passwd group subuid subgid; do mount --bind "$files/$name" "/etc/$name"; done
exec setpriv --reuid="$uid" --regid="$uid" --clear-groups "$@"
"""


def missing() -> str:
    """What this host lacks to run rootless commands; empty if nothing."""
    if os.geteuid() != 0:
        return "root, which makes the user"
    tools = ("newuidmap", "newgidmap", "setpriv", "unshare")
    return ", ".join(tool for tool in tools if shutil.which(tool) is None)


def rootless(argv: Sequence[str], folder: Path) -> list[str]:
    """The command that runs ``argv`` as the user; ``folder`` is for its files, and is made."""
    folder.mkdir(parents=True)
    for name in ("passwd", "group"):
        line = f"{NAME}:x:{UID}:" + (f"{UID}::{folder}:/bin/sh\n" if name == "passwd" else "\n")
        (folder / name).write_text(Path("/etc", name).read_text() + line)
    for name, content in FILES.items():
        (folder / name).write_text(content)
    python = str(Path(sys.executable).resolve().parents[1])
    return [
        "unshare", "--mount", "--propagation=private", "sh", "-ec", SCRIPT, "sh",
        str(folder), python, str(UID), *argv,
    ]  # fmt: skip
