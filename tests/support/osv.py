"""Exports of OSV, small."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def record(name: str, *events: dict[str, str], ecosystem: str = "PyPI", **changes: Any) -> Any:
    ranges = [{"type": "ECOSYSTEM", "events": list(events)}]
    row = {"package": {"ecosystem": ecosystem, "name": name}, "ranges": ranges}
    return {"id": "X-1", "modified": "2026-11-29T00:00:00Z", "affected": [row], **changes}


def export(folder: Path, *records: Any) -> Path:
    path = folder / "all.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, row in enumerate(records):
            archive.writestr(f"{number}.json", json.dumps(row))
    return path


def since(version: str, **more: str) -> list[dict[str, str]]:
    return [{"introduced": version}, *({kind: value} for kind, value in more.items())]
