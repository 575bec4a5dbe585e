"""Late stops: found in a source tree, covered by the committed rows, compared with the record."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vllm_forge.kernels.errors import SelectionChangedError, SelectionFileError
from vllm_forge.kernels.selection.stops import (
    Stop,
    find_stops,
    read_scopes,
    read_stops,
    require_cited,
    require_same_stops,
    write_stops,
)
from vllm_forge.matrix import load
from vllm_forge.sources import SourceRepo

ROOT = Path(__file__).parents[3]
SOURCE = """
class DeepseekV32IndexerMetadataBuilder:
    def __init__(self, capability, buffer):
        assert buffer is not None
        assert capability == 100, "sm_10x only"

    def build(self, lens):
        if lens < 0:
            raise ValueError(f"negative: {lens}")
"""
FILE = "vllm/v1/attention/backends/mla/indexer.py"


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceRepo, str]:
    """A repository with one file of a scope and one of none, and its tree."""
    folder = tmp_path_factory.mktemp("source")
    for name in (FILE, "vllm/lora/utils.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(SOURCE)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "add", "."], check=True)
    tree = subprocess.run(
        ["git", "-C", str(folder), "write-tree"], check=True, capture_output=True, text=True
    )
    return SourceRepo(folder / ".git"), tree.stdout.strip()


def test_statements_of_the_scopes_are_found(repo: tuple[SourceRepo, str]) -> None:
    """Whether something is None tells a type checker, and no user."""
    assert [tuple(stop.model_dump().values()) for stop in find_stops(*repo)] == [
        (
            f"{FILE}:5",
            "DeepseekV32IndexerMetadataBuilder.__init__",
            "assert capability == 100, 'sm_10x only'",
            "asked",
        ),
        (
            f"{FILE}:9",
            "DeepseekV32IndexerMetadataBuilder.build",
            "raise ValueError(f'negative: {lens}')",
            "internal",
        ),
    ]


@pytest.mark.parametrize(
    "source", [f"{FILE}:5: assert len(", f"{FILE}:4: assert capability", "vllm/gone.py:1: x"]
)
def test_wrong_citation_is_refused(source: str, repo: tuple[SourceRepo, str]) -> None:
    require_cited(*repo, f"{FILE}:5: assert capability == 100")
    with pytest.raises(SelectionChangedError, match="does not have the text"):
        require_cited(*repo, source)


def test_rows_name_their_cover() -> None:
    scopes = read_scopes()
    assert {scope.cover for scope in scopes.scope} == set(scopes.cover)


@pytest.mark.parametrize("line", load(ROOT).line)
def test_committed_stops_are_covered(line: str) -> None:
    """Recorded by kernels select, which fails when the source has others."""
    stops = read_stops(ROOT / "records", line)
    assert {stop.cover for stop in stops} == set(read_scopes().cover)
    builders = [s for s in stops if s.function == "DeepseekV32IndexerMetadataBuilder.__init__"]
    assert builders
    assert {stop.cover for stop in builders} == {"asked"}


def test_changed_source_is_refused(tmp_path: Path) -> None:
    stop = Stop(where="a.py:1", function="f", text="assert x", cover="asked")
    write_stops(tmp_path, "0.1", (stop,))
    require_same_stops(tmp_path, "0.1", (stop,))
    moved = stop.model_copy(update={"where": "a.py:2"})
    with pytest.raises(SelectionChangedError) as error:
        require_same_stops(tmp_path, "0.1", (moved,))
    assert "- a.py:1: assert x (asked)" in str(error.value)
    assert "+ a.py:2: assert x (asked)" in str(error.value)


def test_missing_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SelectionFileError, match=r"kernels select --record --line 0\.1"):
        read_stops(tmp_path, "0.1")
