"""The packages of this Python as text, whose hash is what a receipt of an environment is bound to.

A row is ``name==version record=<sha256>``: the hash is of the installed RECORD, in which each
file's own hash stands, so that a wheel of the same version with other contents is another row.
"""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata

FILE = "environment.txt"


def environment_text() -> str:
    """One row per distribution that an import would find, sorted, after a row for Python."""
    rows: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"].lower().replace("_", "-").replace(".", "-")
        if name in rows:
            continue  # further down the path, so never imported
        record = distribution.read_text("RECORD")
        digest = hashlib.sha256(record.encode()).hexdigest() if record else "none"
        rows[name] = f"{name}=={distribution.version} record={digest}"
    python = f"# Python {platform.python_version()} on {platform.machine()}"
    return "\n".join([python, *(rows[name] for name in sorted(rows))]) + "\n"
