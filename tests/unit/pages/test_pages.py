"""Generated pages are current; tables and blocks are well formed."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from vllm_forge.cli import main
from vllm_forge.errors import UsageError
from vllm_forge.pages.errors import StalePageError
from vllm_forge.pages.markdown import put_block, table
from vllm_forge.pages.registry import PAGES, check_pages, write_pages
from vllm_forge.project import Project

if TYPE_CHECKING:
    from pathlib import Path

SLIMMER = 0.30


@pytest.mark.parametrize("path", PAGES)
def test_page_is_current(root: Path, path: str) -> None:
    check_pages(Project(root), path)


def test_every_generated_page_is_registered(root: Path) -> None:
    pages = {path.relative_to(root).as_posix() for path in (root / "docs/generated").iterdir()}
    assert pages == {path for path in PAGES if path.startswith("docs/generated/")}


def test_stale_and_missing_pages_are_named_and_rewritten(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("benchmarks", "tests", "src"):
        (tmp_path / name).symlink_to(root / name)
    shutil.copy(root / "matrix.toml", tmp_path)
    for name in ("patches", "docker", "records"):  # not read by a link
        shutil.copytree(root / name, tmp_path / name)
    for path in PAGES:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((root / path).read_bytes())
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(tmp_path))
    assert main(["docs", "--check"]) == 0
    stale = tmp_path / "docs/generated/race.md"
    text = stale.read_text()
    stale.write_text(text.replace("clean launches", "launches"))
    (tmp_path / "matrix.schema.json").unlink()
    assert main(["docs", "--check"]) == StalePageError.exit_code
    message = capsys.readouterr().err
    assert "docs/generated/race.md, matrix.schema.json" in message
    assert "nox -s docs" in message
    assert write_pages(Project(tmp_path)) == ["docs/generated/race.md", "matrix.schema.json"]
    assert stale.read_text() == text
    stale.unlink()
    assert main(["docs"]) == UsageError.exit_code
    assert "docs/generated/race.md" in capsys.readouterr().err


def test_table_escapes_bars_and_groups_digits() -> None:
    assert table(["a", "b"], [["x|y", 1234567]]) == "| a | b |\n|---|---|\n| x\\|y | 1,234,567 |"


def test_block_is_replaced_between_its_marks() -> None:
    page = "A\n<!-- generated: x -->\nold\n<!-- end: x -->\nB\n"
    expected = "A\n<!-- generated: x -->\nnew\n<!-- end: x -->\nB\n"
    assert put_block(page, "x", "new", where="p.md") == expected


@pytest.mark.parametrize(
    "page", ["", "<!-- generated: x -->", "<!-- end: x --><!-- generated: x -->"]
)
def test_missing_marks_are_named(page: str) -> None:
    with pytest.raises(UsageError, match="generated: x"):
        put_block(page, "x", "new", where="p.md")


def test_images_are_slim(root: Path) -> None:
    images = json.loads((root / "benchmarks/results/sizes.json").read_text())
    for name, image in images.items():
        assert image["image"] <= (1 - SLIMMER) * (image["system"] + image["wheels"]), name


def test_slim_libraries_computed_the_same_on_a_gpu(root: Path) -> None:
    """What docs/operate/images.md says of the H200 run."""
    result = json.loads((root / "benchmarks/results/slim-h200.json").read_text())
    assert {row["slim"] for row in result["operations"].values()} == {"same"}
    assert result["control"] == "failed"
