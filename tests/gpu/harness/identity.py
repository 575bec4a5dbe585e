"""What makes a checkpoint the one that it is: ``python -m tests.gpu.harness.identity DIR``.

matrix.toml pins what this prints ([artifact.NAME] identity). A folder's name proves nothing.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from tests.gpu.harness.errors import InputError

LARGEST = 1 << 28  # bytes of a header; safetensors itself allows 100 MB


def identity(folder: Path) -> str:
    """SHA-256 in hex over config.json, the index, and each shard's name, size and header.

    Weights themselves are not read; tests with known answers judge them.

    Raises:
        InputError: not a folder of safetensors files.
    """
    try:
        digests = json.dumps(_digests(folder), sort_keys=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot identify the checkpoint: {error}",
            where=str(folder),
            remedy="give a folder with config.json and safetensors files",
        ) from None
    return hashlib.sha256(digests.encode()).hexdigest()


def _digests(folder: Path) -> dict[str, list[object]]:
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    texts = [folder / "config.json", *([index] if index.exists() else [])]
    digests: dict[str, list[object]] = {
        path.name: [hashlib.sha256(path.read_bytes()).hexdigest()] for path in texts
    }
    if not shards:
        raise ValueError("no safetensors files")
    for shard in shards:
        with shard.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= LARGEST or len(header := file.read(size)) != size:
                raise ValueError(f"{shard.name} has no header")
        digests[shard.name] = [shard.stat().st_size, hashlib.sha256(header).hexdigest()]
    return digests


if __name__ == "__main__":
    print(identity(Path(sys.argv[1])))
