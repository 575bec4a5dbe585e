"""Bits of whole images: of the small one, and of a real one where dist/ has it (`nox -s build`)."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support.project import REPO
from vllm_forge.images.errors import LayoutError
from vllm_forge.images.layout import Image, hex_digest, read_image, verify

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.project import Project

pytestmark = pytest.mark.engine

LEAST, MOST = 3, 200  # bits of one blob
HASHED = 1 << 30  # bytes that all of them may cost, if that allows LEAST


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def flip_bits(image: Image, folder: Path) -> int:
    """Change bits of a copy of each blob, one at a time; returns how many were found."""
    blobs, count = folder / "blobs" / "sha256", 0
    blobs.mkdir(parents=True)
    rows = [image.manifest["config"], *image.manifest["layers"]]
    for name in sorted({image.digest, *(hex_digest(row["digest"]) for row in rows)}):
        path = blobs / name  # a copy: the blob's inode is also the cache's
        shutil.copyfile(image.blob(name), path)
        # An image of this blob only, so that a bit costs no more than its blob.
        alone = Image(
            path=folder, digest=name, config={}, manifest={"config": {"digest": name}, "layers": []}
        )
        size, dice = path.stat().st_size, random.Random(name)  # noqa: S311 - the same each time
        bits = {0, 8 * size - 1, *(dice.randrange(8 * size) for _ in range(MOST - 2))}
        for bit in sorted(bits, key=lambda _: dice.random())[: max(LEAST, HASHED // size)]:
            flip(path, bit)
            with pytest.raises(LayoutError, match=name):
                verify(alone)
            flip(path, bit)
            count += 1
        verify(alone)
        path.unlink()
    return count


def test_changed_bit_of_any_blob_is_refused(built: Project, tmp_path: Path) -> None:
    real = sorted(path.parent for path in (REPO / "dist").glob("*/index.json"))
    for number, layout in enumerate([built.root / "dist" / "vllm-0.1.0-alpha", *real[:1]]):
        image = read_image(layout)
        verify(image)
        blobs = 2 + len(image.manifest["layers"])
        assert flip_bits(image, tmp_path / str(number)) >= LEAST * blobs
