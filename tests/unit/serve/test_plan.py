"""The plan of a cell: what files of the repository say, and "unknown" where they do not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_forge.cli import main
from vllm_forge.images.record import keep_digest
from vllm_forge.kernels.selection.questions import Moe
from vllm_forge.kernels.selection.record import read_selection, write_selection
from vllm_forge.matrix import load
from vllm_forge.matrix.errors import UnsupportedCellError

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[3]
RECORDS = ROOT / "records"
MATRIX = load(ROOT)
CELLS = [(line, sku) for line, row in MATRIX.line.items() for sku in row.skus]
MARLIN = "VLLM_TEST_FORCE_FP8_MARLIN"

Plan = dict[str, Any]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., Plan]:
    """The JSON of `vllm-forge plan`."""

    def run(*argv: str) -> Plan:
        assert main(["plan", *argv, "--json"]) == 0
        made: Plan = json.loads(capsys.readouterr().out)
        return made

    return run


def why_not(row: Plan, line: str) -> str | None:
    """What the matrix says of a row of the plan's presets."""
    drafting = MATRIX.preset[row["preset"]].speculative_tokens > 0
    return MATRIX.artifact[row["artifact"]].why_not(
        line, MATRIX.preset[row["preset"]].sku, drafting=drafting
    )


def test_b300_selects_native_fp4_without_forcing_anything(plan: Callable[..., Plan]) -> None:
    made = plan("--sku=b300")
    assert made["cell"]["line"] == MATRIX.default_line
    rows = [row for row in made["presets"] if row["artifact"] == "flash-nvfp4-fp8-mtp"]
    assert {row["preset"] for row in rows} == {"b300-mtp", "b300-plain"}
    for row in rows:
        assert row["selection"]["experts"] == "FLASHINFER_TRTLLM"
        assert MARLIN not in json.dumps(row["command"]) + row["bare"]
        assert row["state"] == "not run"


NATIVE = {"nvfp4": "FLASHINFER_CUTLASS", "w4a16": "MARLIN", "mxfp4": "DEEPGEMM_MXFP4"}


@pytest.mark.parametrize("line", ["0.26", "0.33"])
def test_rtxpro6000_selects_cutlass(line: str, plan: Callable[..., Plan]) -> None:
    made = plan("--sku=rtxpro6000", f"--line={line}")
    assert made["lines"][line]["experts"] == "FLASHINFER_CUTLASS"
    for row in made["presets"]:
        if why_not(row, line) is not None:
            continue
        stored = MATRIX.artifact[row["artifact"]].experts
        assert row["selection"]["experts"] == NATIVE[stored]


def test_rtxpro6000_is_refused_on_the_line_that_cannot(
    plan: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    reason = MATRIX.line["0.22"].unsupported["rtxpro6000"]
    assert plan("--sku=rtxpro6000")["lines"]["0.22"]["refused"] == reason
    assert main(["plan", "--sku=rtxpro6000", "--line=0.22"]) == UnsupportedCellError.exit_code
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("line", "sku"), CELLS)
def test_clamp_of_every_cell(line: str, sku: str, plan: Callable[..., Plan]) -> None:
    """As the line's vLLM answered; and no preset runs experts without their limit."""
    answers = read_selection(RECORDS, line).answers
    rows = plan(f"--sku={sku}", f"--line={line}")["presets"]
    assert rows
    for row in rows:
        if why_not(row, line) is not None:
            continue
        answer = answers[f"preset/{row['preset']}/{row['artifact']}"]
        assert answer.moe is not None
        assert row["selection"]["clamp"] == answer.moe.clamp == "reaches"
        assert row["selection"]["graphs"]["covers"]


@pytest.mark.parametrize(("line", "sku"), CELLS)
def test_unserved_artifact_is_rejected_with_the_reason(
    line: str, sku: str, plan: Callable[..., Plan]
) -> None:
    """Whatever its vLLM would select of it; and everything else is not refused."""
    rows = plan(f"--sku={sku}", f"--line={line}")["presets"]
    assert {row["selection"]["refused"] for row in rows} > {None}
    for row in rows:
        assert row["selection"]["refused"] == why_not(row, line)
        if why_not(row, line) is not None:
            assert {v for k, v in row["selection"].items() if k != "refused"} == {"none"}


def test_page_says_why_it_is_refused(
    plan: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan("--sku=b300", "--line=0.33")
    (reason,) = {row["selection"]["refused"] for row in made["presets"]} - {None}
    assert main(["plan", "--sku=b300", "--line=0.33"]) == 0
    page = capsys.readouterr().out
    for word in ("refused:", *reason.split()):
        assert word in page, word


def test_a_line_that_does_not_serve_the_first_preset_says_so(
    checkout: Path, plan: Callable[..., Plan]
) -> None:
    path = checkout / "matrix.toml"
    path.write_text(
        path.read_text()
        + "\n[[artifact.flash-nvfp4-fp8-mtp.unserved]]\n"
        + 'lines = ["0.33"]\nreason = "a reason of this test"\n'
    )
    lines = plan("--sku=b300", "--line=0.26")["lines"]
    assert lines["0.33"]["refused"] == "a reason of this test"
    assert lines["0.26"]["refused"] is None


@pytest.mark.parametrize(
    ("line", "words"), [("0.26", "does not think unless"), ("0.33", "thinks unless")]
)
def test_plan_says_what_a_chat_does(line: str, words: str, plan: Callable[..., Plan]) -> None:
    """Case 20."""
    made = plan("--sku=b300", f"--line={line}")
    assert made["chat"].startswith(words)
    assert f"vLLM {MATRIX.line[line].vllm}, vllm/tokenizers/deepseek_v4.py:" in made["chat"]


@pytest.mark.parametrize(
    ("line", "sku", "issues"),
    [
        ("0.26", "b300", {"#46796"}),
        ("0.33", "b300", {"#46796"}),
        ("0.26", "rtxpro6000", {"#48052", "#52938", "#12"}),
        ("0.26", "b200", set()),
        ("0.26", "h200", set()),
    ],
)
def test_plan_names_open_issues(
    line: str, sku: str, issues: set[str], plan: Callable[..., Plan]
) -> None:
    """Cases 21 and 22."""
    made = plan(f"--sku={sku}", f"--line={line}")
    assert {f"#{row['about'].partition('#')[2]}" for row in made["known_issues"]} == issues
    assert all(row["settled_by"] for row in made["known_issues"])


def test_pins_series_and_needs(plan: Callable[..., Plan]) -> None:
    made = plan("--sku=b300", "--line=0.26")
    assert made["pins"]["packages"]["torch"] == MATRIX.line["0.26"].torch
    assert len(made["pins"]["packages"]) == made["pins"]["lock"]["wheels"]
    assert made["series"]["patches"][0]["proves"].startswith("tests/patches/")
    rows = {(row["preset"], row["artifact"]): row["needs"] for row in made["presets"]}
    needs = rows["b300-mtp", "flash-nvfp4-fp8-mtp"]
    assert needs["weights_bytes"] == 181_271_988_296
    assert needs["weights_per_gpu_bytes"] == 45_972_179_272
    assert needs["disk_bytes"] == needs["image_bytes"] + needs["weights_bytes"]
    assert needs["ram_bytes"] == needs["weights_bytes"] // 35
    assert (needs["longest_context"], needs["memory"][:3]) == (1048576, "ok:")
    assert needs["image_bytes"] > made["pins"]["lock"]["bytes"] * 3
    redhat = rows["b300-plain", "redhat-nvfp4-fp8"]
    assert redhat["ram_bytes"] == "unknown"  # of one shard file: their number is not known
    assert {key for key, value in redhat.items() if value == "unknown"} == {"ram_bytes"}
    assert redhat["image_bytes"] == needs["image_bytes"]


def test_unrecorded_selection_is_unknown(checkout: Path, plan: Callable[..., Plan]) -> None:
    made = plan("--sku=b300")
    rows = [row for row in made["presets"] if why_not(row, MATRIX.default_line) is None]
    for choice in (*made["lines"].values(), *(row["selection"] for row in rows)):
        assert (choice["experts"], choice["clamp"]) == ("unknown", "unknown")
    assert made["contract"]["state"].startswith("unknown")
    assert made["image"]["digest"] == "not built here"
    assert made["image"]["receipts"] == []
    assert checkout.is_dir()


def test_answers_to_another_preset_are_not_shown(
    checkout: Path, root: Path, plan: Callable[..., Plan]
) -> None:
    shutil.copytree(root / "records" / "selection", checkout / "records" / "selection")
    path = checkout / "matrix.toml"
    path.write_text(path.read_text().replace("speculative_tokens = 2", "speculative_tokens = 1"))
    rows = {
        row["preset"]: row["selection"]
        for row in plan("--sku=b300")["presets"]
        if row["artifact"] == "flash-nvfp4-fp8-mtp"
    }
    assert rows["b300-mtp"]["experts"] == "unknown"
    assert rows["b300-plain"]["experts"] == "FLASHINFER_TRTLLM"


def test_a_lost_clamp_is_shown(checkout: Path, root: Path, plan: Callable[..., Plan]) -> None:
    recorded = read_selection(root / "records", "0.26")
    rows = tuple(
        (q, a.model_copy(update={"moe": Moe(chosen="MARLIN", clamp="lost")}))
        if q.name == "preset/b300-mtp/flash-nvfp4-fp8-mtp"
        else (q, a)
        for q, a in recorded.rows
    )
    write_selection(checkout / "records", replace(recorded, rows=rows))
    shown = {
        (row["preset"], row["artifact"]): row["selection"]["clamp"]
        for row in plan("--sku=b300", "--line=0.26")["presets"]
    }
    assert [key for key, clamp in shown.items() if clamp == "lost"] == [
        ("b300-mtp", "flash-nvfp4-fp8-mtp")
    ]


def test_each_line_says_what_its_own_vllm_selects(plan: Callable[..., Plan]) -> None:
    for line, row in plan("--sku=b300")["lines"].items():
        answer = read_selection(RECORDS, line).answers["preset/b300-mtp/flash-nvfp4-fp8-mtp"]
        assert answer.attention is not None
        assert row["attention"] == answer.attention.chosen


def coverage(**cells: Any) -> Plan:
    return {name: {"b300": cell} for name, cell in cells.items()}


def cell(verdict: str, *, needed: bool = True, exception: str | None = None) -> Plan:
    by = ["every cell"] if needed else None
    return {"verdict": verdict, "codes": ["100f"], "needed_by": by, "exception": exception}


@pytest.mark.parametrize(
    ("found", "state", "families"),
    [
        (coverage(a=cell("native"), b=cell("family"), c=cell("source")), "holds", "abc"),
        (coverage(a=cell("native"), b=cell("missing", needed=False)), "holds", "a"),
        (coverage(a=cell("missing"), b=cell("ptx")), "broken: a, b", "ab"),
        (coverage(a=cell("missing", exception="slow, and right")), "holds", "a"),
    ],
)
def test_contract(
    found: Plan, state: str, families: str, checkout: Path, plan: Callable[..., Plan]
) -> None:
    folder = checkout / "records" / "coverage"
    folder.mkdir(parents=True)
    lock = hashlib.sha256((checkout / MATRIX.line["0.26"].lock).read_bytes()).hexdigest()
    path = folder / "0.26.json"
    path.write_text(json.dumps({"lock": lock, "coverage": found}))
    contract = plan("--sku=b300", "--line=0.26")["contract"]
    assert contract["state"] == state
    assert set(contract["families"]) == set(families)
    path.write_text(json.dumps({"lock": "of before", "coverage": found}))
    state = plan("--sku=b300", "--line=0.26")["contract"]["state"]
    assert state == "unknown: records/coverage/0.26.json is of another lock"


def test_first_start_without_network_is_said_of_the_image_that_needs_it(
    checkout: Path, root: Path, plan: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    """By the coverage of record; an image that was built with its archives needs none."""
    shutil.copytree(root / "records", checkout / "records")
    needs = "needs network at first start: trtllm_gen_moe; or build with --kernels"
    assert plan("--sku=b300")["image"]["network"] == needs
    assert plan("--sku=b300", "--line=0.22")["image"]["network"] == "none"
    assert plan("--sku=rtxpro6000")["image"]["network"] == "none"
    serve = ["serve", "--sku=b300", "--preset=mtp", "--print"]
    doctor = ["doctor", "--sku=b300", "--json"]

    def said(argv: list[str]) -> str:
        main(argv)
        return "".join(capsys.readouterr()).replace("\n", " ")

    assert needs in said(serve)
    assert needs in said(doctor)
    record = {
        "digest": f"sha256:{'3' * 64}", "blobs": {}, "engine": "buildah",
        "inputs": {"kernels": {"format": 1}},
    }  # fmt: skip
    path = checkout / "dist" / "vllm-0.26.0-b300.json"
    path.parent.mkdir()
    path.write_text(json.dumps(record))
    assert plan("--sku=b300")["image"]["network"] == needs, "the cache knows no such build"
    keep_digest(path, {"kernels": {"format": 1}}, f"sha256:{'3' * 64}")
    assert plan("--sku=b300")["image"]["network"] == "none"
    assert needs not in said(serve)
    assert needs not in said(doctor)


def test_equal_files_give_equal_bytes(root: Path) -> None:
    """Whatever the hash seed, the time zone and the terminal."""
    outputs = set()
    for seed, zone, columns in (("1", "UTC", "80"), ("2", "Asia/Tokyo", "200")):
        env = {"PYTHONHASHSEED": seed, "TZ": zone, "COLUMNS": columns, "VLLM_FORGE_ROOT": str(root)}
        argv = [sys.executable, "-m", "vllm_forge", "plan", "--sku=b300", "--json"]
        done = subprocess.run(argv, env={**os.environ, **env}, capture_output=True, check=True)
        outputs.add(done.stdout)
    (text,) = outputs
    made = json.loads(text)
    assert json.dumps(made, indent=1, sort_keys=True) + "\n" == text.decode()


def test_no_network_and_nothing_is_written(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)
    plan("--sku=b300")
    assert not cache.exists()


def test_page_says_what_the_json_says(
    plan: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan("--sku=b300")
    assert main(["plan", "--sku=b300"]) == 0
    page = capsys.readouterr().out
    for words in (
        made["pins"]["lock"]["sha256"][:12],
        made["series"]["tree"][:12],
        made["series"]["patches"][0]["name"],
        "FLASHINFER_TRTLLM",
        "384 >= 384",
        "not run",
        "195.5 GB: image 14.2 GB, weights 181.3 GB",
        made["image"]["build"],
        *made["presets"][0]["shell"].splitlines(),
    ):
        assert words in page, words
