"""Conversations to calibrate with, as token ids in the model's own chat form."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_forge.checkpoints.checkpoint import Folder
from vllm_forge.checkpoints.errors import ModelInputError, RecipeError
from vllm_forge.checkpoints.fixtures.tiny import TEMPLATE
from vllm_forge.checkpoints.quantize.inputs import Recipe
from vllm_forge.host import console, parse_json, read_plain

SHIPPED = Path(__file__).with_name("data") / "conversations.jsonl"
ULTRACHAT, SPLIT = "HuggingFaceH4/ultrachat_200k", "train_sft"
AUTO = "auto"
ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_BYTES = 1 << 30
SHOWN = 200  # characters of a path, or of another's error
Conversation = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Token ids, one row per conversation, and the data set or file that they come from."""

    source: str
    tokens: tuple[tuple[int, ...], ...]

    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        text = json.dumps([list(row) for row in self.tokens])
        return {
            "source": self.source,
            "samples": len(self.tokens),
            "tokens": sum(len(row) for row in self.tokens),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }


NO_DATA = Calibration(source="none: the recipe quantizes weights only", tokens=())


def calibrate_with(choice: str, recipe: Recipe, model: Path) -> Calibration:
    """Choose conversations and tokenize them; needs the tools' environment.

    ``choice``: ``auto``, ``ultrachat``, ``shipped``, or a JSONL file with ``messages`` in each row.
    """
    if choice == AUTO:
        choice = "ultrachat" if _reachable() else "shipped"
    match choice:
        case "ultrachat":
            from datasets import load_dataset  # noqa: PLC0415

            split = load_dataset(ULTRACHAT, split=SPLIT).shuffle(seed=recipe.seed)
            rows = [row["messages"] for row in split.select(range(recipe.samples))]
            source = f"{ULTRACHAT} {SPLIT}, seed {recipe.seed}"
        case "shipped":
            console.print(
                f"[yellow]calibration data:[/] the shipped conversations, not {ULTRACHAT}: good "
                "for a trial, too few for a model that people use"
            )
            rows, source = read_conversations(SHIPPED, recipe.samples), f"shipped {SHIPPED.name}"
        case path:
            rows, source = read_conversations(Path(path), recipe.samples), Path(path).name
    return Calibration(source=source, tokens=tokenize(rows, recipe.tokens, model))


def read_conversations(path: Path, samples: int) -> list[Conversation]:
    """The first conversations of a JSONL file; RecipeError for too few, or another form."""
    try:
        lines = read_plain(path.resolve(), MOST_BYTES).decode("utf-8").split("\n")
        rows = [parse_json(line)["messages"] for line in lines if line.strip()]
        for row in rows:
            _check(row)
    except FileNotFoundError:
        raise RecipeError("there is no such file of conversations", where=str(path)) from None
    except OSError as error:
        raise RecipeError(
            f"the file of conversations cannot be read: {error.strerror}", where=str(path)[:SHOWN]
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"not a file of conversations: {type(error).__name__}: {error}",
            where=str(path),
            remedy='one JSON object per line: {"messages": [{"role": ..., "content": ...}, ...]}',
        ) from None
    if len(rows) < samples:
        raise RecipeError(
            f"the recipe asks for {samples} conversations, here are {len(rows)}",
            where=str(path),
            remedy="name a larger file with --data, or let ultrachat be reached",
        )
    return rows[:samples]


def _check(row: Any) -> None:
    """Refuse what a chat template renders as nothing, without a word."""
    for message in row:
        if not isinstance(message["role"] + message["content"], str):
            raise TypeError("role and content are text")
        if message["role"] not in ROLES:
            raise ValueError(
                f"unknown role {message['role']!r}: expected one of {', '.join(ROLES)}"
            )
    if not any(message["content"].strip() for message in row):
        raise ValueError("a conversation without text")


def _reachable() -> bool:
    import httpx  # noqa: PLC0415
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled  # noqa: PLC0415

    try:
        HfApi().dataset_info(ULTRACHAT, timeout=10)
    except (httpx.HTTPError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        why = f"  {ULTRACHAT} cannot be reached: {type(error).__name__}"
        console.print(why, style="dim", markup=False)
        return False
    return True


def tokenize(rows: Sequence[Conversation], most: int, model: Path) -> tuple[tuple[int, ...], ...]:
    """Ids of each conversation in the chat form of the model, or of DeepSeek-V4 if it has none.

    ``most`` ids of each are kept; ``model`` is a folder with tokenizer and config.json.
    """
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    tokens: list[tuple[int, ...]] = []
    try:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(model)
        template = tokenizer.chat_template or TEMPLATE.read_text(encoding="utf-8")
        for row in rows:
            text = tokenizer.apply_chat_template(row, chat_template=template, tokenize=False)
            tokens.append(tuple(tokenizer.encode(text, add_special_tokens=False)[:most]))
    except Exception as error:  # noqa: BLE001 - tokenizers raises no narrower one, templates any
        raise ModelInputError(
            f"tokenizer or chat template fail: {type(error).__name__}: {str(error)[:SHOWN]}",
            where=str(model),
            remedy="take tokenizer.json, tokenizer_config.json and the template from the source",
        ) from None
    vocabulary = Folder(model).config()["vocab_size"]
    for ids in tokens:
        if not ids or max(ids) >= vocabulary:
            raise ModelInputError(
                f"the tokenizer gives ids up to {max(ids)}, config.json has a vocabulary of "
                f"{vocabulary}"
                if ids
                else "the tokenizer and its template make nothing of a conversation",
                where=str(model),
                remedy="take config.json and the tokenizer from the same model",
            )
    return tuple(tokens)
