"""Late stops: found in a source tree, covered by the committed rows, compared with the record."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.late_stops import RECORDS, find_stops, read_scopes
from vllm_forge.host import cache_root
from vllm_forge.matrix import load
from vllm_forge.patches import read_tree_lock
from vllm_forge.sources import SourceRepo

ROOT = Path(__file__).parents[3]
# Found at import: during a test the cache is a temporary one.
CACHE = SourceRepo(cache_root() / "sources.git")
MATRIX = load(ROOT)
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
    assert find_stops(*repo) == (
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
    )


def test_rows_name_their_cover() -> None:
    scopes = read_scopes()
    assert {scope.cover for scope in scopes.scope} == set(scopes.cover)


@pytest.fixture(params=MATRIX.line)
def patched(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A line, and its source tree with the series, which the cache has."""
    tree = read_tree_lock(ROOT / MATRIX.line[request.param].series, request.param).result
    if not CACHE.path.exists() or CACHE.git("cat-file", "-e", tree, check=False).returncode:
        pytest.skip(f"the tree of line {request.param} is not cached: `nox -s patches` makes it")
    return request.param, tree


def test_committed_stops_are_those_of_the_source(patched: tuple[str, str]) -> None:
    line, tree = patched
    stops = find_stops(CACHE, tree)
    record = json.loads((ROOT / RECORDS / f"{line}.json").read_text())
    remedy = "correct late_stops.toml, or record them: python -m tests.support.late_stops"
    assert record["covers"] == read_scopes().cover, remedy
    assert [list(stop) for stop in stops] == record["stops"], remedy
    assert {stop.cover for stop in stops} == set(record["covers"])
    builders = [s for s in stops if s.function == "DeepseekV32IndexerMetadataBuilder.__init__"]
    assert builders
    assert {stop.cover for stop in builders} == {"asked"}


def test_cited_code_of_a_chat_is_in_the_source(patched: tuple[str, str]) -> None:
    """``PATH:LINE: TEXT`` of matrix.toml."""
    line, tree = patched
    if (chat := MATRIX.line[line].chat) is None:
        return
    place, _, text = chat.source.partition(": ")
    path, _, number = place.rpartition(":")
    content = CACHE.git("cat-file", "blob", f"{tree}:{path}").stdout.decode()
    assert text in content.splitlines()[int(number) - 1]
