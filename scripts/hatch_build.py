"""Put what commands read of a checkout, and its commit, into the wheel; the sdist has the commit.

Both are built from a checkout or, as `python -m build` and `uv build` do, the wheel from the sdist.
"""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMMIT = "COMMIT"
PRIVATE = b"PRIVATE KEY-----"


class DataHook(BuildHookInterface):
    """``data`` of pyproject.toml -> ``vllm_forge/data``; not in an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        root, include = Path(self.root), build_data["force_include"]
        self.work = tempfile.TemporaryDirectory()
        commit = Path(self.work.name, COMMIT)
        commit.write_text(f"{commit_of(root)}\n", encoding="utf-8")
        if self.target_name == "sdist":
            include[str(commit)] = COMMIT
            return
        include[str(commit)] = f"vllm_forge/data/{COMMIT}"
        build_data["extra_metadata"][str(commit)] = COMMIT
        require_committed(root, self.config["data"])
        for name in self.config["data"]:
            include[str(root / name)] = f"vllm_forge/data/{name}"
            for path in (root / name).rglob("*"):
                if path.is_symlink() or (path.is_file() and PRIVATE in path.read_bytes()):
                    raise SystemExit(f"{path} is a link or a private key: remove it")

    def finalize(self, *_: Any) -> None:
        if hasattr(self, "work"):
            self.work.cleanup()


def require_committed(root: Path, names: list[str]) -> None:
    """Refuse files that git ignores: COMMIT would say that they are of the commit."""
    if not (root / ".git").exists():
        return
    argv = ["git", "-C", str(root), "status", "--porcelain", "--ignored", "--", *names]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    rows = [row[3:] for row in done.stdout.splitlines() if row.startswith("!! ")]
    if ignored := [row for row in rows if not row.endswith("__pycache__/")]:
        raise SystemExit(f"{ignored[0]} is not of the commit, as git ignores it: remove it")


def commit_of(root: Path) -> str:
    """The commit that the files are of, and whether they differ from it."""
    if not (root / ".git").exists():
        carried = root / COMMIT
        return carried.read_text(encoding="utf-8").strip() if carried.is_file() else "unknown"
    rows = []
    for command in (["rev-parse", "--verify", "HEAD"], ["status", "--porcelain", "-unormal"]):
        argv = ["git", "-C", str(root), *command]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"cannot tell the commit: {' '.join(argv)}: {done.stderr.strip()}")
        rows.append(done.stdout.strip())
    return f"{rows[0]} with changes" if rows[1] else rows[0]
