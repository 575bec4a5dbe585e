"""The tiny model's tokenizer: one token per byte, DeepSeek-V4's special tokens and chat form.

The special tokens and how a conversation is put together are those of vLLM's renderer (vLLM 0.26.0,
vllm/tokenizers/deepseek_v4_encoding.py:20-35 and render_message), without tools and thinking.
"""

# The special tokens are spelled with full-width bars.
# ruff: noqa: RUF001
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIAL = (BOS, EOS, PAD, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜")
BYTES = 256
TEMPLATE = Path(__file__).with_name("data") / "chat_template.jinja"


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json.

    Args:
        folder: must exist.
        vocab: the model's vocabulary; ids beyond ours are placeholders, as upstream has them.
    """
    documents = {
        "tokenizer.json": _tokenizer(vocab),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 65536,
        },
        "generation_config.json": {
            "bos_token_id": SPECIAL.index(BOS),
            "eos_token_id": SPECIAL.index(EOS),
            "do_sample": True,
            "temperature": 1.0,
        },
    }
    for name, content in documents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(TEMPLATE, folder / TEMPLATE.name)


def _tokenizer(vocab: int) -> dict[str, Any]:
    pieces = [*SPECIAL, *_byte_characters()]
    placeholders = [f"<｜place▁holder▁no▁{number}｜>" for number in range(vocab - len(pieces))]
    added = [
        {
            "id": number, "content": piece, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
        for number, piece in enumerate([*pieces, *placeholders])
        if number < len(SPECIAL) or number >= len(pieces)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {piece: number for number, piece in enumerate([*pieces, *placeholders])},
            "merges": [],
        },
    }


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte (openai/gpt-2, encoder.py)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(BYTES) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(BYTES + hidden.index(byte)) for byte in range(BYTES)
    ]
