"""What the installer that this project started from does to the releases of our lines.

Its edits are data here: a text to look for, what comes in its place, what it prints when the text
is not there. `python tests/unit/patches/test_seed_installer.py` writes docs/generated/seed-installer.md, which the
last test compares. The sources are those that `nox -s patches` has imported; unlike in other unit
tests they come from the user's cache, and are only read.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from vllm_forge.host import cache_root
from vllm_forge.matrix import load
from vllm_forge.patches import read_series
from vllm_forge.sources import SourceRepo

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "generated" / "seed-installer.md"
MATRIX = load(ROOT)
# Found at import: during a test the cache is a temporary one.
REPO = SourceRepo(cache_root() / "sources.git")
MERGED = "already applied or merged"
COMPRESSED_TENSORS = (
    "vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py"
)
MODEL = "vllm/models/deepseek_v4/nvidia/model.py"
ATTENTION = "vllm/models/deepseek_v4/attention.py"


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One `sed` of the installer: every line of ``file`` with ``old`` gets ``new`` for it.

    Attributes:
        change: the upstream pull request that it stands for.
        claims: the number of places that it prints, None where it prints none.
        missing: what it prints when no line has ``old``, and then goes on.
    """

    change: int
    file: str
    old: str
    new: str
    claims: int | None
    missing: str


EDITS = (
    Edit(
        change=43248,
        file=COMPRESSED_TENSORS,
        old="is_static_input_scheme = input_quant and not input_quant.dynamic",
        new="is_static_input_scheme = bool(input_quant and not input_quant.dynamic)",
        claims=5,
        missing=MERGED,
    ),
    Edit(
        change=43288,
        file=MODEL,
        old='self.scale_fmt = config.quantization_config["scale_fmt"]',
        new='self.scale_fmt = (getattr(config, "quantization_config", None) or {})'
        '.get("scale_fmt", "ue8m0")',
        claims=None,
        missing=MERGED,
    ),
    Edit(
        change=43290,
        file=ATTENTION,
        old="weight_scale_inv = self.wo_a.weight_scale_inv",
        new='weight_scale_inv = getattr(self.wo_a, "weight_scale_inv", None)'
        " or self.wo_a.weight_scale",
        claims=None,
        missing=MERGED,
    ),
)
CHANGES = tuple(edit.change for edit in EDITS)


@dataclass(frozen=True, kw_only=True)
class Landing:
    """What became of one edit on one line.

    Attributes:
        edit: the edit.
        line: the line.
        there: the file exists.
        places: lines that it changes.
        needed: hunks of our patch for the same change on this line; 0 where we carry none.
    """

    edit: Edit
    line: str
    there: bool
    places: int
    needed: int

    @property
    def said(self) -> str:
        """What the installer prints."""
        if not self.places:
            return self.edit.missing
        return "patching" if self.edit.claims is None else f"patching, {self.edit.claims} sites"

    @property
    def truth(self) -> str:
        """What is so."""
        if not self.needed:
            return "not needed" if not self.places else "changed without need"
        if self.places >= self.needed:
            return "lands"
        missed = "the file is not there" if not self.there else "no line has its text"
        return f"lands in {self.places} of {self.needed} places" if self.places else missed


def source(line: str, path: str) -> str | None:
    """A file of the line's release as published, None where it has no such file."""
    done = REPO.git("cat-file", "blob", f"{tree(line)}:{path}", check=False)
    return done.stdout.decode() if done.returncode == 0 else None


def tree(line: str) -> str:
    release = MATRIX.line[line].vllm
    found = REPO.tree(release)
    if found is None:
        pytest.skip(
            f"the source of vLLM {release} is not in the cache: `nox -s patches` fetches it"
        )
    return found


def apply(edit: Edit, text: str) -> tuple[str, int]:
    """The text after the edit and the number of lines that it changed."""
    lines = text.splitlines(keepends=True)
    hits = [number for number, line in enumerate(lines) if edit.old in line]
    for number in hits:
        lines[number] = lines[number].replace(edit.old, edit.new)
    return "".join(lines), len(hits)


def landing(edit: Edit, line: str) -> Landing:
    text = source(line, edit.file)
    ours = [
        patch.diff.count("\n@@ ")
        for patch in read_series(ROOT / MATRIX.line[line].series)
        if patch.fields["Bug"].endswith(f"/{edit.change}")
    ]
    return Landing(
        edit=edit,
        line=line,
        there=text is not None,
        places=apply(edit, text)[1] if text is not None else 0,
        needed=sum(ours),
    )


def render(landings: list[Landing]) -> str:
    lines = [
        "# The installer that this project started from",
        "",
        "For these checkpoints an installer is in use that clones vLLM, changes its source with",
        "`sed`, and builds it. An edit whose text is not in the file prints that the change is",
        f'"{MERGED}" and the build goes on, so nobody learns that a patch is',
        "missing. This table is what becomes of its three edits on the releases of our lines; its",
        "fourth change, 43319, is no edit but a cherry-pick from a fork. Generated by",
        "`python tests/unit/patches/test_seed_installer.py`; do not edit.",
        "",
        "| change | vLLM | it prints | lines changed | what is so |",
        "|---|---|---|---|---|",
    ]
    for item in landings:
        release = MATRIX.line[item.line].vllm
        lines.append(
            f"| {item.edit.change} | {release} | {item.said} | {item.places} | {item.truth} |"
        )
    wanted = [item for item in landings if item.needed]
    whole = sum(item.truth == "lands" for item in wanted)
    silent = sum(item.said == MERGED for item in wanted)
    lines += [
        "",
        f"* edits that are needed: {len(wanted)} of {len(landings)};",
        f"* of those, in every place: {whole};",
        f'* reported as "{MERGED}" although the release has the fault: {silent}.',
        "",
        "Places are counted as hunks of our patch for the same change",
        "(`patches/vllm/<line>/series`); where we carry none, a test in tests/patches shows that",
        "the release does not need it.",
        "",
        "The text that the edit for 43290 puts in (`getattr(...) or ...`) would raise for every",
        "scale of more than one element; see `test_or_on_a_block_scale_raises` in",
        "tests/patches/test_harm.py.",
        "",
        "Here such an edit is a patch that applies with zero fuzz and zero offset to a source tree",
        "of known hash, or the build ends: [patches.md](patches.md).",
    ]
    return "\n".join(lines) + "\n"


def all_landings() -> list[Landing]:
    return [landing(edit, line) for edit in EDITS for line in MATRIX.line]


@pytest.mark.parametrize(
    ("line", "places"),
    [("0.22", (2, 1, 0)), ("0.26", (2, 0, 0)), ("0.33", (2, 0, 0))],
)
def test_lines_that_the_edits_change(line: str, places: tuple[int, ...]) -> None:
    assert tuple(landing(edit, line).places for edit in EDITS) == places


def test_no_edit_finds_all_places_of_43248() -> None:
    """Two sites stand on one line each; the third is written over three lines."""
    for line in MATRIX.line:
        found = landing(EDITS[0], line)
        assert found.needed == 3
        assert found.truth == "lands in 2 of 3 places"


@pytest.mark.parametrize("line", ["0.22", "0.26"])
def test_a_needed_change_is_reported_as_merged(line: str) -> None:
    found = landing(EDITS[2], line)
    assert found.needed
    assert (found.there, found.places, found.said) == (True, 0, MERGED)


@pytest.mark.parametrize("edit", EDITS, ids=CHANGES)
def test_what_the_edits_leave_is_python(edit: Edit) -> None:
    for line in MATRIX.line:
        text = source(line, edit.file)
        if text is not None:
            ast.parse(apply(edit, text)[0])


def test_an_edit_changes_every_line_with_its_text_and_no_other() -> None:
    edit = Edit(change=1, file="f", old="a = b", new="a = c", claims=None, missing="")
    assert apply(edit, "a = b\n  a = b and\na = (\n b)\n") == (
        "a = c\n  a = c and\na = (\n b)\n",
        2,
    )


@pytest.mark.parametrize(
    ("there", "places", "needed", "said", "truth"),
    [
        (True, 1, 1, "patching", "lands"),
        (True, 1, 3, "patching", "lands in 1 of 3 places"),
        (True, 0, 1, MERGED, "no line has its text"),
        (False, 0, 1, MERGED, "the file is not there"),
        (True, 0, 0, MERGED, "not needed"),
        (True, 1, 0, "patching", "changed without need"),
    ],
)
def test_words_of_the_table(there: bool, places: int, needed: int, said: str, truth: str) -> None:
    found = Landing(edit=EDITS[1], line="0.22", there=there, places=places, needed=needed)
    assert (found.said, found.truth) == (said, truth)


def test_the_page_is_what_the_sources_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(all_landings())


if __name__ == "__main__":
    PAGE.write_text(render(all_landings()), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
