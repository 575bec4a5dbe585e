"""Apply the edits of the installer that this project started from to the releases of the lines.

    python benchmarks/seed_installer.py

Its edits are data here: a text to look for, its replacement, and what the installer prints when
the text is missing. Writes records/seed-installer.json, and its page.
"""

from __future__ import annotations

import ast
from dataclasses import asdict, dataclass

from vllm_forge.host import write_json
from vllm_forge.pages.records import MERGED
from vllm_forge.pages.registry import write_pages
from vllm_forge.patches import check_line, read_series
from vllm_forge.project import Project
from vllm_forge.sources import SourceRepo


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One `sed` of the installer: ``old`` is replaced in every line of ``file`` that has it.

    ``change``: the upstream pull request; ``claims``: the number of places that it prints.
    """

    change: int
    file: str
    old: str
    new: str
    claims: int | None = None


EDITS = (
    Edit(
        change=43248,
        file="vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py",
        old="is_static_input_scheme = input_quant and not input_quant.dynamic",
        new="is_static_input_scheme = bool(input_quant and not input_quant.dynamic)",
        claims=5,
    ),
    Edit(
        change=43288,
        file="vllm/models/deepseek_v4/nvidia/model.py",
        old='self.scale_fmt = config.quantization_config["scale_fmt"]',
        new='self.scale_fmt = (getattr(config, "quantization_config", None) or {})'
        '.get("scale_fmt", "ue8m0")',
    ),
    Edit(
        change=43290,
        file="vllm/models/deepseek_v4/attention.py",
        old="weight_scale_inv = self.wo_a.weight_scale_inv",
        new='weight_scale_inv = getattr(self.wo_a, "weight_scale_inv", None)'
        " or self.wo_a.weight_scale",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one edit does on one line; ``needed``: hunks of the line's own patch for the change."""

    change: int
    claims: int | None
    line: str
    release: str
    exists: bool
    places: int
    needed: int
    parses: bool

    @property
    def prints(self) -> str:
        if not self.places:
            return MERGED
        return "patching" if self.claims is None else f"patching, {self.claims} sites"

    @property
    def verdict(self) -> str:
        if not self.needed:
            return "not needed" if not self.places else "changed without need"
        if self.places >= self.needed:
            return "lands"
        missed = "text not found" if self.exists else "file not found"
        return f"lands in {self.places} of {self.needed} places" if self.places else missed


def apply_edit(edit: Edit, text: str) -> tuple[str, int]:
    """The text after the edit, and the number of lines that it changed."""
    hits = sum(edit.old in line for line in text.splitlines())
    return text.replace(edit.old, edit.new), hits


def outcome(project: Project, repo: SourceRepo, edit: Edit, line: str) -> Outcome:
    """Apply an edit to the release of a line, whose source the repository has."""
    release = project.matrix.line[line].vllm
    shown = repo.git("cat-file", "blob", f"{repo.tree(release)}:{edit.file}", check=False)
    text, places = apply_edit(edit, shown.stdout.decode())  # nothing where there is no such file
    try:
        ast.parse(text)
        parses = True
    except SyntaxError:
        parses = False
    return Outcome(
        change=edit.change,
        claims=edit.claims,
        line=line,
        release=release,
        exists=shown.returncode == 0,
        places=places,
        needed=sum(
            patch.diff.count("\n@@ ")
            for patch in read_series(project.root / project.matrix.line[line].series)
            if patch.fields["Bug"].endswith(f"/{edit.change}")
        ),
        parses=parses,
    )


def as_row(row: Outcome) -> dict[str, object]:
    """A row of the record."""
    return {**asdict(row), "prints": row.prints, "verdict": row.verdict}


def main() -> None:
    project, repo = Project.find(), SourceRepo()
    for line in project.matrix.line:
        check_line(project, line, repo)  # imports its release
    rows = [outcome(project, repo, edit, line) for edit in EDITS for line in project.matrix.line]
    write_json(project.records / "seed-installer.json", [as_row(row) for row in rows])
    write_pages(project, "docs/generated/seed-installer.md")


if __name__ == "__main__":
    main()
