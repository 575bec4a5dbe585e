"""The two good patches of ``tests/fixtures/patches`` and the source tree that they are for."""

from __future__ import annotations

from pathlib import Path

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "patches"
BROKEN = FIXTURES / "broken"
GOOD = FIXTURES / "0001-good.patch"
SECOND = FIXTURES / "0002-second.patch"
RELEASE = "9.9.1"
SDIST = f"vllm-{RELEASE}.tar.gz"


def source_files() -> dict[str, bytes]:
    """Path -> content of the source tree."""
    source = FIXTURES / "source"
    return {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in sorted(source.rglob("*"))
        if path.is_file()
    }
