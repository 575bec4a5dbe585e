"""The tiny tokenizer and the chat form are those of vLLM's own renderer."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest
from transformers import PreTrainedTokenizerFast

from vllm_forge.checkpoints.quantize.inputs import SHIPPED, read_conversations, tokenize
from vllm_forge.sources import SourceRepo

if TYPE_CHECKING:
    from pathlib import Path

ENCODING = "refs/sdist/0.26.0:vllm/tokenizers/deepseek_v4_encoding.py"


@pytest.fixture(scope="module")
def encoding() -> types.ModuleType:
    repo = SourceRepo()
    if repo.tree("0.26.0") is None:
        pytest.skip("the source of vLLM 0.26.0 is not cached: `nox -s patches` fetches it")
    module = types.ModuleType("deepseek_v4_encoding")
    exec(repo.git("show", ENCODING).stdout, module.__dict__)  # noqa: S102 - a locked source
    return module


def test_conversations_render_as_vllm_renders_them(bf16: Path, encoding: Any) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bf16)
    for row in read_conversations(SHIPPED, 64):
        ours = tokenizer.apply_chat_template(row, tokenize=False)
        assert ours == encoding.encode_messages(row, thinking_mode="chat")


def test_a_system_message_and_a_prompt(bf16: Path, encoding: Any) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bf16)
    row = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ours = tokenizer.apply_chat_template(row, tokenize=False, add_generation_prompt=True)
    assert ours == encoding.encode_messages(row, thinking_mode="chat")


def test_tokens_are_bytes_and_special_tokens_are_one(bf16: Path) -> None:
    row = [{"role": "user", "content": "ä b"}, {"role": "assistant", "content": "<x>"}]
    (tokens,) = tokenize([row], 512, bf16)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bf16)
    assert tokens[:2] == (0, tokenizer.convert_tokens_to_ids("<｜User｜>"))  # noqa: RUF001
    assert tokens[-1] == 1
    assert len(tokens) == len("ä b<x>".encode()) + 5
    assert tokenizer.decode(tokens).endswith("</think><x><｜end▁of▁sentence｜>")  # noqa: RUF001
    assert tokenize([row], 4, bf16) == (tokens[:4],)
