"""The config.json of each artifact, as far as it is known, without its weights.

``artifacts/<name>.json`` has ``config``, and where its values are from: ``sources``, and what
is ``unknown``. ``base`` names a file whose config it adds to.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_forge.kernels.errors import ArtifactConfigError

FOLDER = Path(__file__).with_name("artifacts")
KEYS = {"base", "sources", "unknown", "config"}


def artifact_config(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The config.json of an artifact of the matrix.

    Raises:
        ArtifactConfigError: there is none, or its file is malformed.
    """
    data = _read(name, folder)
    base = artifact_config(data["base"], folder) if "base" in data else {}
    return {**base, **data["config"]}


def config_hash(name: str, folder: Path = FOLDER) -> str:
    """SHA-256 of the config: what selection is a function of."""
    text = json.dumps(artifact_config(name, folder), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(name: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{name}.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        unknown = set(data) - KEYS
        problem = f"unknown keys {sorted(unknown)}" if unknown else ""
        if not data.get("sources") or not isinstance(data["config"], dict):
            problem = "sources and config must be there"
    except FileNotFoundError:
        problem = f"no config.json is known of artifact {name}"
    except (ValueError, KeyError, AttributeError) as error:
        problem = f"not an artifact's config: {error!r}"
    if problem:
        raise ArtifactConfigError(
            problem,
            where=str(path),
            remedy="write it: the config.json that the artifact has, and where it is from",
        )
    return data
