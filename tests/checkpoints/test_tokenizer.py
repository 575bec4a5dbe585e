"""A tokenizer or a chat template that cannot be used is told, before anything is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from vllm_forge.checkpoints.errors import ModelInputError
from vllm_forge.checkpoints.fixtures.tiny import write_tokenizer
from vllm_forge.checkpoints.quantize.calibrate import pick_device
from vllm_forge.checkpoints.quantize.inputs import tokenize
from vllm_forge.checkpoints.tensors import CONFIG
from vllm_forge.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 512
ROWS = [[{"role": "user", "content": "hello"}]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path, VOCABULARY)
    (tmp_path / CONFIG).write_text(json.dumps({"vocab_size": VOCABULARY}))
    return tmp_path


def test_a_whole_one_gives_ids(model: Path) -> None:
    ((*ids,),) = tokenize(ROWS, 100, model)
    assert ids and max(ids) < VOCABULARY
    (model / "chat_template.jinja").unlink()  # the shipped one is DeepSeek-V4's
    assert tokenize(ROWS, 100, model) == (tuple(ids),)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", '{"a": 1}'),
        ("tokenizer_config.json", "nonsense"),
        ("chat_template.jinja", "{% if %}"),
        ("chat_template.jinja", "{{ raise_exception('no') }}"),
    ],
    ids=range(5),
)
def test_what_cannot_be_used_is_reported(model: Path, file: str, text: str | None) -> None:
    (model / file).unlink(missing_ok=True)
    if text is not None:
        (model / file).write_text(text)
    with pytest.raises(ModelInputError, match="tokenizer or chat template fail"):
        tokenize(ROWS, 100, model)


def test_a_tokenizer_of_a_larger_model_is_reported(model: Path) -> None:
    (model / CONFIG).write_text(json.dumps({"vocab_size": 2}))
    with pytest.raises(ModelInputError, match=r"config\.json has a vocabulary of 2"):
        tokenize(ROWS, 100, model)


def test_a_template_that_renders_nothing_is_reported(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{# nothing #}")
    with pytest.raises(ModelInputError, match="make nothing of a conversation"):
        tokenize(ROWS, 100, model)


def test_a_device_without_numbers_is_refused() -> None:
    with pytest.raises(UsageError, match="--device meta"):
        pick_device("meta")
