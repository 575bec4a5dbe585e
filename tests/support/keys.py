"""Keys of tests: made when they are needed, trusted nowhere else."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from vllm_forge.signing import FOLDER

if TYPE_CHECKING:
    from pathlib import Path

KINDS = {
    "ed25519": ["-algorithm", "ed25519"],
    "p256": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
    "p384": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
    "rsa": ["-algorithm", "RSA"],
}
ROW = {
    "owner": '"A Tester (tester@localhost)"',
    "roles": '["release", "builder", "receipts", "vex"]',
    "valid_from": "2020-01-01",
    "valid_until": "2199-12-31",
}
REVOKED = {"revoked": '{ date = 2026-02-03, reason = "stolen laptop" }'}


def key_pair(folder: Path, kind: str = "ed25519") -> tuple[Path, Path]:
    """A private and a public key as openssl's command makes them."""
    folder.mkdir(exist_ok=True)
    private, public = folder / "key.pem", folder / "public.pem"
    for command in (
        ["genpkey", *KINDS[kind], "-out", private],
        ["pkey", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)
    return private, public


def trust(root: Path, public: Path | bytes, name: str = "release", **row: str) -> Path:
    """Add a public key to the keyring of a checkout; values of ``row`` are TOML."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"[key.{name}]", *(f"{key} = {value}" for key, value in (ROW | row).items()), ""]
    with (folder / "keyring.toml").open("a") as file:
        file.write("\n".join(lines))
    path = folder / f"{name}.pem"
    path.write_bytes(public if isinstance(public, bytes) else public.read_bytes())
    return path
