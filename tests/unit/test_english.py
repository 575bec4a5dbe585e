"""House English (docs/develop/style.md): phrases that code, pages and test names do without."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
# "there is no X" and "is no longer" are English; "X is no folder" is not.
PHRASES = re.compile(
    r"""\b(?<!there\ )(?:is|are|was|were)\ no\ (?!longer\b|more\b|less\b)[a-z]
    |\bthat\ (?:is|are)\ none\b |\bis\ not\ such\ an?\b |\bwhat\ is\ so\b |\bstands?\ (?:twice|on)\b
    |\banew\b |\b(?:is|are)\ told\b |\btells\b |\bof\ ours\b |\bwhich\ [\w.-]+\ has\ not\b
    |\blies?\ beside\b |\b(?:its|their)\ own\ words\b |\bwho(?:ever)?\ ends\ it\b
    |\bone\ that\ is\ not\b |\bnothing\ half\b |\blet\ it\ be\b |\bso\ that\ it\ is\ not\b""",
    re.IGNORECASE | re.VERBOSE,
)
TEST_NAMES = re.compile(
    r"_(?:is|are)_(?:no|none|told)(?:_|$)|_that_(?:is|are)_none|_tells_|_anew(?:_|$)|_of_ours(?:_|$)"
)
LISTS_THE_PHRASES = "docs/develop/style.md"


def tracked(*paths: str) -> list[Path]:
    """Files of the repository, those that are not committed yet included."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *paths],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [REPO / name for name in names if (REPO / name).is_file()]


def test_code_and_pages_avoid_the_phrases() -> None:
    findings = []
    for path in tracked("src", "docs", "*.md"):
        name = str(path.relative_to(REPO))
        if path.suffix not in {".py", ".md"} or name == LISTS_THE_PHRASES or "generated" in name:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if phrase := PHRASES.search(line):
                findings.append(f"{name}:{number}: {phrase[0]!r}")
    assert not findings, f"rephrase as {LISTS_THE_PHRASES} says:\n" + "\n".join(findings)


def test_names_of_tests_avoid_the_phrases() -> None:
    findings = [
        f"{path.relative_to(REPO)}: {name}"
        for path in tracked("tests")
        if path.suffix == ".py"
        for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
        if TEST_NAMES.search(name)
    ]
    assert not findings, "name the behaviour: test_<thing>_<behaviour>:\n" + "\n".join(findings)


@pytest.mark.parametrize(
    "text",
    [
        "X is no folder",
        "field X stands twice",
        "written anew",
        "its own words are above",
        "of ours",
    ],
)
def test_phrase_is_recognized(text: str) -> None:
    assert PHRASES.search(text)


@pytest.mark.parametrize("text", ["there is no such file", "it is no longer here", "not a folder"])
def test_plain_english_is_accepted(text: str) -> None:
    assert not PHRASES.search(text)
