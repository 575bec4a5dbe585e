"""Kernels that JIT compilers made before, as a layer: the first start does not compile them again.

They lie below /opt/vllm-forge/jit. Compilers write where they read, so the image's entrypoint
copies them to the /cache volume once, under a name of their own, and the compilers' variables point
there. A volume that an image with other kernels used keeps its own folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_forge.images.wheels import Entry

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BAKED = "/opt/vllm-forge/jit"
SCRIPT = "/opt/vllm-forge/prewarmed"
VARIABLE = "VLLM_FORGE_JIT"
ENTRYPOINT = f"""#!/bin/sh
# The first start of a volume copies the kernels there; what is compiled later joins them.
set -eu
if [ ! -d "${{{VARIABLE}}}" ]; then
    mkdir -p "${{{VARIABLE}%/*}}"
    # Not named by the process: in each container it is the first.
    aside="$(mktemp -d "${{{VARIABLE}}}.XXXXXX")"
    trap 'rm -rf "${{aside}}"' EXIT
    cp -R --preserve=timestamps {BAKED}/. "${{aside}}"
    # Of two that start at once, the second keeps the first one's; anything else is an error.
    mv -T "${{aside}}" "${{{VARIABLE}}}" || [ -d "${{{VARIABLE}}}" ]
    rm -rf "${{aside}}"
    trap - EXIT
fi
exec "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Prewarm:
    """Caches that were made by a run of the same stack.

    Attributes:
        folder: what the compilers left, and the key file.
        variables: environment variable of a compiler -> its folder's name.
        key: the stack that they are for.
        digest: SHA-256 over names and contents, hex.
    """

    folder: Path
    variables: Mapping[str, str]
    key: Mapping[str, str]
    digest: str

    @property
    def place(self) -> str:
        """Where they are in a running container."""
        return f"/cache/jit/{self.digest[:16]}"

    def environment(self) -> dict[str, str]:
        """Variables of the image."""
        found = {name: f"{self.place}/{folder}" for name, folder in self.variables.items()}
        return found | {VARIABLE: self.place}

    def record(self) -> dict[str, Any]:
        """For stack.json."""
        return {"sha256": self.digest, "key": dict(self.key), "bytes": self.size}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def entries(self) -> list[Entry]:
        """Files of the layer, the entrypoint's script among them."""
        found = [Entry(path=SCRIPT[1:], mode=0o755, content=ENTRYPOINT.encode())]
        for path in self.folder.rglob("*"):
            if path.is_file():
                name = f"{BAKED}/{path.relative_to(self.folder).as_posix()}"[1:]
                mode = 0o755 if path.stat().st_mode & 0o111 else 0o644
                found.append(Entry(path=name, mode=mode, content=path.read_bytes()))
        return sorted(found, key=lambda entry: entry.path)


def tree_digest(folder: Path) -> str:
    """SHA-256 over the names, modes and contents of a folder's files."""
    rows = [
        (
            path.relative_to(folder).as_posix(),
            bool(path.stat().st_mode & 0o111),
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
