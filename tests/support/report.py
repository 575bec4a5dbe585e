"""A checkout whose records can be changed, and the report as its elements."""

from __future__ import annotations

import shutil
from collections import Counter
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import TYPE_CHECKING

from vllm_forge.pages.status import RELEASES
from vllm_forge.project import Project
from vllm_forge.release.gate import (
    SLSA_VERSION,
    VERIFIER,
    Decision,
    Detail,
    Resource,
    Verifier,
    Waiver,
)
from vllm_forge.release.statements import VSA
from vllm_forge.signing import load_private, sign
from vllm_forge.signing.bundle import Statement, Subject

if TYPE_CHECKING:
    from pathlib import Path

WAIVED = Waiver(tier="soak", until=datetime(2027, 1, 31, tzinfo=UTC).date(), reason="no such host")


def checkout(root: Path, folder: Path) -> Project:
    """A copy of what the report reads."""
    folder.mkdir(exist_ok=True)
    (folder / "tests").symlink_to(root / "tests")
    (folder / "src").symlink_to(root / "src")
    shutil.copy(root / "matrix.toml", folder)
    for name in ("patches", "docker", "records"):
        shutil.copytree(root / name, folder / name)
    return Project(folder)


def decide(
    project: Project, key: Path, waiver: Waiver = WAIVED, *, cell: str = "", days: int = 0
) -> Path:
    """Commit a decision of ``days`` ago that waives a tier; default: of b300 on line 0.26."""
    digest = {"sha256": "d19e" * 16}
    decision = Decision(
        verifier=Verifier(id=VERIFIER, version={"vllm-forge": "0"}),
        timeVerified=datetime(2026, 11, 30, tzinfo=UTC) - timedelta(days=days),
        resourceUri="pkg:oci/vllm",
        policy=Resource(uri="matrix.toml#release.release", digest=digest),
        inputAttestations=(),
        verificationResult="PASSED",
        verifiedLevels=(),
        slsaVersion=SLSA_VERSION,
        vllmForge=Detail(stage="release", tags=("0.26-b300",), waivers=(waiver,)),
    )
    statement = Statement(
        subject=(Subject(name=cell or project.cell("b300", "0.26").name, digest=digest),),
        predicate_type=VSA,
        predicate=decision.model_dump(mode="json", by_alias=True),
    )
    path = project.root / RELEASES / "0.26.0-forge.1-b300.sigstore.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(sign(statement.content, load_private(key)))
    return path


class Page(HTMLParser):
    """Tags and attributes of a page by count, links, and its text with one space between words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self._parts: list[str] = []
        self.feed(text)
        self.close()
        self.text = " ".join(" ".join(self._parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)
        self.links += [value or "" for name, value in attrs if name in {"href", "src"}]
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"} and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self._parts.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())
