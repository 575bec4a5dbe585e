"""What a margin needs, against the figures of textbooks and against what the gates do."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from vllm_forge.bench import plan, statistics
from vllm_forge.bench.arms import published
from vllm_forge.bench.claims import Comparison, Share
from vllm_forge.bench.errors import ClaimsFileError
from vllm_forge.bench.statistics import ALPHA
from vllm_forge.cli import main
from vllm_forge.matrix.errors import RecordFileError
from vllm_forge.project import Project

if TYPE_CHECKING:
    from pathlib import Path


def rows(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str
) -> list[dict[str, Any]]:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    assert main(["bench", "plan", "--json", *argv]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("discordant", "items"), [(0.02, 1713), (0.03, 2570), (0.04, 3426), (0.06, 5139)]
)
def test_items_for_a_margin_of_one_point(discordant: float, items: int) -> None:
    assert plan.items_needed(discordant, 0.01) == items
    assert plan.smallest_margin(discordant, items) == pytest.approx(0.01, rel=1e-3)


def test_more_difference_than_discordance_has_no_number_of_items() -> None:
    assert plan.items_to_detect(0.02, 0.03) is None
    assert plan.items_to_detect(0.02, 0.02) == 522


def test_repeats_of_an_item_are_not_more_items() -> None:
    """400 and 240 of 480 answers to 30 problems."""
    first, second = (Share(arm=arm, of=30, answers=16, right=right)
                     for arm, right in (("a", 400), ("b", 240)))  # fmt: skip
    row = Comparison(id="x", says="x", at="x", group="quality", kind="comparison", claims="higher",
                     first=first, second=second, varies=(), suite="aime24")  # fmt: skip
    assert plan._items(row, plan.read_suites()["aime24"]) == "28 of 30 items, paired"


@pytest.mark.parametrize(("noise", "pairs"), [(0.004, 5), (0.01, 6), (0.1, None)])
def test_starts_for_a_margin_of_two_percent(noise: float, pairs: int | None) -> None:
    assert plan.pairs_needed(noise, -0.02) == pairs


def test_planned_starts_have_their_power() -> None:
    rng = np.random.default_rng(20261130)
    logs = rng.normal(0, 0.01, size=(600, 2, 6))
    found = [statistics.speed(a, b, 0.02) for a, b in np.exp(logs).tolist()]
    assert np.mean([row.passes < ALPHA for row in found]) == pytest.approx(plan.POWER, abs=0.05)


def test_plan_says_what_cannot_be_decided(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(root, monkeypatch, capsys, "--noise=0.1", "--noise=0.004", "--start-seconds=60",
                 "--run-seconds=30")  # fmt: skip
    by_place = {(row["gate"], row["of"].partition(",")[0]): row for row in found}
    assert by_place["strict", "mmlu-pro"]["decides"] == "decidable"
    assert "cannot be decided; decidable from 2.0 pp" in by_place["strict", "gsm8k"]["decides"]
    assert by_place["throughput", "a start varies by 10 %"]["decides"] == "cannot be decided"
    assert by_place["throughput", "a start varies by 0.4 %"]["minutes"] == "15"
    assert by_place["acceptance", "drafts by prompt"]["needs"] == "unknown"


def test_unknown_names_of_claims_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "records" / "bench", tmp_path / "records" / "bench")
    for name in ("matrix.toml", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(tmp_path))
    file = tmp_path / "records" / "bench" / "claims.toml"
    file.write_text(file.read_text().replace('suite = "gsm8k"', 'suite = "gsm8l"', 1))
    assert main(["bench", "plan", "--card"]) == ClaimsFileError.exit_code
    assert "unknown suite 'gsm8l' (did you mean 'gsm8k'?)" in capsys.readouterr().err
    (tmp_path / "records" / "bench" / "claims.json").write_text("{}")
    assert main(["bench", "plan", "--card"]) == RecordFileError.exit_code
    file.write_text(file.read_text().replace('preset = "b300-mtp"', 'preset = "b300-mtq"', 1))
    with pytest.raises(ClaimsFileError, match=r"serve\.mtp: unknown preset 'b300-mtq' \(did"):
        list(published(Project(tmp_path), []))


def test_card_plan_is_not_run_and_names_presets(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {row["figure"]: row for row in rows(root, monkeypatch, capsys, "--card")}
    assert {row["state"] for row in found.values()} == {"not run"}
    assert {row["minutes"] for row in found.values()} == {"unknown"}
    speed = found["chat-code at bs=1: 2.13 x RedHat"]
    assert speed["arms"] == "b300-mtp flash-nvfp4-fp8-mtp v b300-plain redhat-nvfp4-fp8"
    assert "5 at 10 %" in speed["needs"]
    assert "cannot be decided" in found["HumanEval 0.915 against RedHat's 0.896"]["needs"]
    exact = next(row for name, row in found.items() if name.startswith("AIME 2024 raw, 25/30"))
    assert "bf16-mtp: no preset" in exact["arms"]
    assert not any(name.startswith("GSM8K strict, 0.9181, is within") for name in found)
