"""The report: its data is that of the records, the file stands alone, and people can read it.

Two checks need programs of others: html-validate (npm, in a node_modules that NODE_PATH names), and
headless Chromium (Debian's), whose screenshots are written to dist/report of the checkout.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import zlib
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from tests.support.keys import key_pair, trust
from tests.support.receipts import edit
from tests.support.report import Page, checkout, decide
from vllm_forge.cli import main
from vllm_forge.matrix.errors import RecordFileError
from vllm_forge.pages.report import CHARTS, LARGEST_CHART, report
from vllm_forge.pages.status import RELEASES, status
from vllm_forge.project import Project
from vllm_forge.receipts import FOLDER

if TYPE_CHECKING:
    from pathlib import Path

PARTS = ("Tests on GPUs", "Patches", "Kernel coverage", "Drift", "Benchmarks")
WIDTHS, HEIGHT = {"wide": 1280, "narrow": 390}, 2400
THEMES = {"light": "1", "dark": "0"}  # of Chromium's setting preferredColorScheme
VALIDATE = """
const { HtmlValidate, StaticConfigLoader } = require("html-validate");
const loader = new StaticConfigLoader({ extends: ["html-validate:recommended"] });
const report = new HtmlValidate(loader).validateFileSync(process.argv[1]);
for (const file of report.results)
  for (const row of file.messages) console.log(`${row.line}: ${row.ruleId}: ${row.message}`);
process.exit(report.valid ? 0 : 1);
"""
CHART = "data:image/svg+xml;base64,"  # what the policy's img-src lets an image have
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><script>x</script></svg>'


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Project:
    return checkout(root, tmp_path / "checkout")


@pytest.fixture(scope="module")
def page() -> str:
    return report(Project.find())


def state(page: Page, sku: str, tier: str, line: str = "0.26") -> str:
    """Text of a cell of a line's grid."""
    heads = [number for number, row in enumerate(page.rows) if row[:1] == ["SKU"]]
    head, *rows = page.rows[heads[("0.22", "0.26", "0.33").index(line)] :]
    row = next(row for row in rows if row[0] == sku)
    return row[head.index(tier)]


def receipt(project: Project, tier: str = "server") -> Path:
    (path,) = (project.root / FOLDER).glob(f"*/h200--0.26--{tier}.json")
    return path


def test_command_writes_the_same_bytes_twice(tmp_path: Path, page: str) -> None:
    paths = [tmp_path / name for name in ("a.html", "b.html")]
    for path in paths:
        assert main(["report", "--output", str(path)]) == 0
        assert path.read_text(encoding="utf-8") == page


def test_page_has_all_parts(page: str) -> None:
    parsed = Page(page)
    heads = re.findall(r'<h2 id="[a-z]+">(.*?)</h2>', page)
    assert tuple(heads) == PARTS
    levels = [int(level) for level in re.findall(r"<h(\d)", page)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert parsed.tags["table"] == parsed.tags["caption"] == parsed.tags["section"]
    for caption in (
        "Line 0.22, vLLM 0.22.1: SKU by tier. End of support: not stated",
        "How each tier ran",
        "Line 0.33, vLLM 0.33.0: patches",
        "Line 0.26, vLLM 0.26.0: device code",
        "vLLM releases by change",
    ):
        assert caption in parsed.text  # fmt: skip


def test_page_loads_and_runs_nothing(page: str) -> None:
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy == (f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
                      "base-uri 'none'; form-action 'none'")  # fmt: skip
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object", "embed", "form"} & parsed.tags.keys()
    assert not {name for name in parsed.attributes if name == "style" or name.startswith("on")}
    assert "url(" not in style and "@import" not in style
    targets = set(re.findall(r'id="([^"]+)"', page))
    for link in parsed.links:
        assert link.startswith(("https://", CHART)) or link[1:] in targets, link


def test_every_colour_is_of_the_style(page: str) -> None:
    style = page.partition("<style>")[2].partition("</style>")[0]
    names = set(re.findall(r'class="([^"]+)"', page))
    assert {"passed-unsigned", "native", "ptx", "applies", "conflict", "proven"} <= names
    assert {name for name in names if not re.search(rf"\.{name}\b", style)} == set()


def test_grid_says_what_was_run(page: str) -> None:
    parsed = Page(page)
    assert state(parsed, "h200", "kernel").startswith("passed, unsigned")
    assert state(parsed, "b300", "kernel") == "not run"
    assert state(parsed, "h200", "kernel", "0.22") == "unsupported"


def test_receipt_of_another_suite_is_stale(project: Project) -> None:
    def change(payload: dict[str, dict[str, list[dict[str, dict[str, str]]]]]) -> None:
        payload["predicate"]["configuration"][0]["digest"]["sha256"] = "0" * 64

    edit(receipt(project), change, consistent=True)
    receipt(project, "kernel").write_text("{}")
    page = Page(report(project))
    assert state(page, "h200", "server").startswith("stale the receipt was made by suite")
    assert state(page, "h200", "kernel").startswith("refused")
    assert f"{FOLDER}/{receipt(project).parent.name}/{receipt(project).name}" in page.text


def test_waiver_is_shown_with_its_end_and_reason(project: Project, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path / "keys")
    path = decide(project, private)
    page = Page(report(project))
    assert state(page, "b300", "soak") == "not run"  # nobody trusts the key
    assert path.name in page.text
    trust(project.root, public, roles='["release"]')
    page = Page(report(project))
    assert state(page, "b300", "soak") == "waived until 2027-01-31: no such host"
    assert state(page, "b300", "kernel") == state(page, "b200", "soak") == "not run"
    assert path.name not in page.text
    assert status(project).count("waived until 2027-01-31: no such host") == 1


@pytest.mark.parametrize(
    ("row", "days", "cell"),
    [
        ({"roles": '["builder"]'}, 0, ""),
        ({"valid_from": "2026-11-01"}, 60, ""),
        ({}, 0, "vllm-9.9-b300"),
        ({}, 0, "vllm-0.22.1-h200"),
    ],
)
def test_waiver_that_does_not_count_is_refused(
    project: Project, tmp_path: Path, row: dict[str, str], days: int, cell: str
) -> None:
    private, public = key_pair(tmp_path / "keys")
    trust(project.root, public, **{"roles": '["release"]', **row})
    path = decide(project, private, days=days, cell=cell)
    text = status(project).replace("\\", "")
    assert "waived until" not in text
    assert f"{RELEASES}/{path.name}:" in text


def test_proof_of_another_series_does_not_count(project: Project) -> None:
    path = project.root / "records/proofs/0.33.json"
    record = json.loads(path.read_text())
    record["trees"]["result"] = "0" * 40
    path.write_text(json.dumps(record))
    words = [row[-1].partition(" no record")[0] for row in Page(report(project)).rows]
    assert words.count("not proven") == 1


def test_chart_is_an_image(project: Project, page: str) -> None:
    assert 'alt="Chart claims.svg"' in page
    for chart in (project.root / CHARTS).rglob("*.svg"):
        chart.unlink()
    assert "No charts are recorded." in report(project)
    chart = project.root / CHARTS / "latency.svg"
    chart.write_text(SVG)
    text = report(project)
    assert f"data:image/svg+xml;base64,{base64.b64encode(SVG.encode()).decode()}" in text
    assert Page(text).tags["svg"] == Page(text).tags["script"] == 0
    chart.write_bytes(b" " * (LARGEST_CHART + 1))
    with pytest.raises(RecordFileError, match="larger"):
        report(project)


def _luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(f * p for f, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_contrast_is_enough_in_both_themes(page: str) -> None:
    assert contrast("#ffffff", "#777777") < 4.5 < contrast("#ffffff", "#767676")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    )
    assert light.keys() == dark.keys() and light["back"] != dark["back"]
    names = [name for name in light if f"{name}-back" in light]
    assert len(names) == 6
    pairs = [("text", "back"), ("dim", "back"), ("link", "back"), ("text", "head"), ("dim", "head")]
    for theme in (light, dark):
        for front, back in [*pairs, *((name, f"{name}-back") for name in names)]:
            assert contrast(theme[front], theme[back]) >= 4.5, (front, theme[front], theme[back])


def validate(path: Path) -> subprocess.CompletedProcess[str]:
    probe = ["node", "-e", "require('html-validate')"]
    if (
        not shutil.which("node")
        or subprocess.run(probe, capture_output=True, check=False).returncode
    ):
        pytest.skip("no html-validate: npm install html-validate@10, and set NODE_PATH to its "
                    "node_modules")  # fmt: skip
    argv = ["node", "-e", VALIDATE, str(path)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_page_is_valid_html(tmp_path: Path, page: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(page)
    done = validate(path)
    assert done.returncode == 0, done.stdout
    for old, new, rule in (
        ("</h1>", "</h2>", "close-order"),
        ('id="run"', 'id="drift"', "no-dup-id"),
        ("<code>", "<code><p></p>", "element-permitted-content"),
    ):
        assert old in page
        path.write_text(page.replace(old, new))
        assert rule in validate(path).stdout


def first_pixel(png: bytes) -> str:
    """Colour of the top left pixel: the first one of a row is the same under every filter."""
    data, at = b"", 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + size]
        at += size + 12
    return "#" + zlib.decompress(data)[1:4].hex()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_screenshot_has_the_theme(
    tmp_path: Path, root: Path, page: str, width: str, theme: str
) -> None:
    if shutil.which("chromium") is None:
        pytest.skip("no chromium: apt-get install chromium")
    path = tmp_path / "report.html"
    path.write_text(page)
    shot = root / "dist" / "report" / f"{width}-{theme}.png"
    shot.parent.mkdir(parents=True, exist_ok=True)
    shot.unlink(missing_ok=True)
    argv = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={WIDTHS[width]},{HEIGHT}",
        f"--blink-settings=preferredColorScheme={THEMES[theme]}", f"--screenshot={shot}",
        path.as_uri(),
    ]  # fmt: skip
    subprocess.run(argv, capture_output=True, check=True, timeout=120)
    png = shot.read_bytes()
    print(f"screenshot: {shot}")
    size = (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big"))
    assert size == (WIDTHS[width], HEIGHT)
    back = re.findall(r"--back: (#[0-9a-f]{6})", page)[list(THEMES).index(theme)]
    assert first_pixel(png) == back
