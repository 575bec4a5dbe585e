"""The report: whoever may write a record, a receipt or a patch, chooses text, and nothing else.

Their text is text: no element, no attribute, no link but to https, no script, no control character.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.keys import key_pair, trust
from tests.support.receipts import body, edit
from tests.support.report import Page, checkout, decide
from vllm_forge.matrix.errors import RecordFileError
from vllm_forge.pages.report import CHARTS, _charts, _link, report
from vllm_forge.pages.status import RELEASES
from vllm_forge.receipts import FOLDER
from vllm_forge.release.gate import Waiver

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_forge.project import Project

MARK = "<script>alert(1)</script>"
HOSTILE = f"{MARK}</td></table><img src=x onerror=alert(2)>\" onclick='x' {{{{ 7*7 }}}} &lt;"


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Project:
    return checkout(root, tmp_path / "checkout")


def receipt(project: Project) -> Path:
    (path,) = (project.root / FOLDER).glob("*/h200--0.26--server.json")
    return path


def gpu(project: Project, _: Path) -> None:
    def change(payload: dict[str, Any]) -> None:
        body(payload)["gpus"][0]["name"] = f"NVIDIA H200 {HOSTILE}"

    edit(receipt(project), change, consistent=True)


def cell(project: Project, _: Path) -> None:
    def change(payload: dict[str, Any]) -> None:
        body(payload)["line"] = HOSTILE

    edit(receipt(project), change, consistent=True)


def suite(project: Project, _: Path) -> None:
    """A name that the refusal repeats."""

    def change(payload: dict[str, Any]) -> None:
        payload["predicate"]["configuration"][0]["name"] = HOSTILE

    edit(receipt(project), change, consistent=True)


def file_name(project: Project, _: Path) -> None:
    (project.root / FOLDER / HOSTILE.replace("/", ":")).mkdir()
    (project.root / FOLDER / HOSTILE.replace("/", ":") / "x.json").touch()


def subject(project: Project, _: Path) -> None:
    path = project.root / "patches/vllm/0.33/0001-compressed-tensors-bool-static-input.patch"
    text = path.read_text()
    text = re.sub(r"(?m)^Description: .*$", lambda _: f"Description: {HOSTILE}", text)
    path.write_text(text)


def record(project: Project, name: str, change: Callable[[Any], Any]) -> None:
    path = project.root / "records" / name
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def proof(project: Project, _: Path) -> None:
    record(
        project, "proofs/0.33.json", lambda data: data["patches"][0]["without"].update(why=HOSTILE)
    )


def exception(project: Project, _: Path) -> None:
    def change(data: Any) -> None:
        data["coverage"]["torch"]["b300"]["exception"] = HOSTILE

    record(project, "coverage/0.26.json", change)


def change_name(project: Project, _: Path) -> None:
    record(project, "drift.json", lambda data: data["changes"][0].update(name=HOSTILE))


def reason(project: Project, folder: Path) -> None:
    private, public = key_pair(folder / "keys")
    trust(project.root, public, roles='["release"]')
    waiver = Waiver.model_validate({"tier": "soak", "until": "2027-01-31", "reason": HOSTILE})
    decide(project, private, waiver)


def chart(project: Project, _: Path) -> None:
    (project.root / CHARTS / f"{HOSTILE.replace('/', ':')}.svg").write_text(f"<svg>{MARK}</svg>")


SHOWN = [suite, file_name, subject, proof, exception, change_name, reason, chart]


@pytest.mark.parametrize("attack", [gpu, cell, *SHOWN], ids=lambda row: row.__name__)
def test_hostile_text_is_text(
    project: Project, tmp_path: Path, attack: Callable[[Project, Path], None]
) -> None:
    attack(project, tmp_path)
    text = report(project)
    page = Page(text)
    if attack in SHOWN:
        assert "onerror=alert(2)" in page.text
        assert "{{ 7*7 }}" in page.text
    assert MARK not in text and "<img src=x" not in text
    usual = {"html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p",
             "code", "ul", "li", "strong", "nav", "a", "main", "span", "section", "table",
             "caption", "thead", "tbody", "tr", "th", "td", "small", "figure",
             "figcaption"}  # fmt: skip
    assert page.tags.keys() - usual <= {"img"}
    assert page.tags["img"] == len(list((project.root / CHARTS).rglob("*.svg")))
    assert not {name for name in page.attributes if name.startswith("on") or name == "style"}
    assert page.tags["table"] == page.tags["section"] == page.tags["caption"]


@pytest.mark.parametrize(
    "url",
    ["javascript:alert(1)", "JAVASCRIPT:alert(1)", "data:text/html,x", "//host/x", "http://host"],
)
def test_link_is_https_only(url: str) -> None:
    assert _link(url) == ""
    assert _link("https://example.invalid/1") == "https://example.invalid/1"


def test_control_characters_are_shown_as_escapes(project: Project) -> None:
    record(
        project, "drift.json", lambda data: data["changes"][0].update(name="a\x1b[2J\u202eb\x00")
    )
    text = report(project)
    assert "a\\x1b[2J\\u202eb\\x00" in text
    assert all(mark.isprintable() or mark == "\n" for mark in text)


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "huge"])
def test_chart_that_is_not_one_is_named(project: Project, kind: str) -> None:
    path = project.root / CHARTS / "more.svg"
    match kind:
        case "link":
            path.symlink_to("/etc/passwd")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            path.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(RecordFileError, match="cannot read a chart") as refused:
        list(_charts(project.root))
    assert refused.value.where == str(path)


def test_decision_that_is_a_link_is_refused(project: Project, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path / "keys")
    trust(project.root, public, roles='["release"]')
    path = decide(project, private)
    (tmp_path / "decision").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "decision")
    text = Page(report(project)).text
    assert "waived until" not in text
    assert f"{RELEASES}/{path.name}" in text
