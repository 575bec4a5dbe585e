"""Which conversations are taken; the data set itself is a stand-in, the library is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets
import httpx
import pytest

from vllm_forge.checkpoints.quantize.inputs import AUTO, ULTRACHAT, calibrate_with, load_recipe

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [{"messages": [{"role": "user", "content": f"number {n}"}]} for n in range(300)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What load_dataset was asked for."""
    calls: list[Any] = []

    def load(name: str, *, split: str) -> datasets.Dataset:
        calls.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def hub(monkeypatch: pytest.MonkeyPatch, answer: Exception | None) -> None:
    def dataset_info(self: Any, repo_id: str, *, timeout: float) -> None:
        assert repo_id == ULTRACHAT
        if answer is not None:
            raise answer

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)


def test_the_card_takes_64_shuffled_with_seed_42(
    bf16: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, None)
    recipe = load_recipe("nvfp4-fp8-mtp")
    calibration = calibrate_with(AUTO, recipe, bf16)
    assert asked == [("HuggingFaceH4/ultrachat_200k", "train_sft")]
    assert calibration.source == "HuggingFaceH4/ultrachat_200k train_sft, seed 42"
    expected = datasets.Dataset.from_list(ROWS).shuffle(seed=42)[:64]["messages"]
    texts = [row[0]["content"] for row in expected]
    # Eight special tokens, then the 256 bytes in order; two of the former stand before the text.
    assert [bytes(token - 8 for token in row[2:]) for row in calibration.tokens] == [
        text.encode() for text in texts
    ]


@pytest.mark.parametrize("error", [httpx.ConnectError("no route"), httpx.ReadTimeout("slow")])
def test_without_the_hub_the_shipped_ones_are_taken_and_said(
    bf16: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception
) -> None:
    hub(monkeypatch, error)
    calibration = calibrate_with(AUTO, load_recipe("nvfp4-fp8-mtp"), bf16)
    assert calibration.source == "shipped conversations.jsonl"
    assert len(calibration.tokens) == 64
    assert "too few for a model that people use" in capsys.readouterr().err
