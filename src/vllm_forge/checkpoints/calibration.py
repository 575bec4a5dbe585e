"""Conversations to calibrate with, as token ids in the model's own chat form."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.errors import RecipeError
from vllm_forge.host import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.checkpoints.recipe import Recipe

DATA = Path(__file__).with_name("data")
SHIPPED = DATA / "conversations.jsonl"
# The form of DeepSeek-V4, for a model folder that brings no template.
TEMPLATE = DATA / "chat_template.jinja"
ULTRACHAT, SPLIT = "HuggingFaceH4/ultrachat_200k", "train_sft"
AUTO = "auto"
Conversation = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Tokens, and where they come from.

    Attributes:
        source: the data set or the file.
        tokens: ids, one row per conversation.
    """

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

    Args:
        choice: ``auto``, ``ultrachat``, ``shipped``, or a JSONL file with ``messages`` in each row.
        recipe: how many, how long, which seed.
        model: folder with the tokenizer.

    Raises:
        RecipeError: fewer conversations than the recipe asks for, or no such file, or not in
            that form.
    """
    source, rows = _conversations(choice, recipe)
    return Calibration(source=source, tokens=tokenize(rows, recipe.tokens, model))


def read_conversations(path: Path, samples: int) -> list[Conversation]:
    """The first conversations of a JSONL file.

    Raises:
        RecipeError: too few, or no such file, or not in that form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line)["messages"] for line in lines if line.strip()]
        for message in (message for row in rows for message in row):
            if not isinstance(message["role"] + message["content"], str):
                raise TypeError("role and content are text")  # noqa: TRY301
    except FileNotFoundError:
        raise RecipeError("there is no such file of conversations", where=str(path)) from None
    except (ValueError, KeyError, TypeError) as error:
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


def _conversations(choice: str, recipe: Recipe) -> tuple[str, list[Conversation]]:
    if choice == AUTO:
        choice = "ultrachat" if _reachable() else "shipped"
    match choice:
        case "ultrachat":
            return f"{ULTRACHAT} {SPLIT}, seed {recipe.seed}", _ultrachat(recipe)
        case "shipped":
            console.print(
                f"[yellow]calibration data:[/] the shipped conversations, not {ULTRACHAT}: good "
                "for a trial, too few for a model that people use"
            )
            return f"shipped {SHIPPED.name}", read_conversations(SHIPPED, recipe.samples)
        case path:
            return Path(path).name, read_conversations(Path(path), recipe.samples)


def _reachable() -> bool:
    """Whether the hub answers for the data set."""
    import httpx  # noqa: PLC0415
    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled  # noqa: PLC0415

    try:
        HfApi().dataset_info(ULTRACHAT, timeout=10)
    except (httpx.HTTPError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        why = f"{ULTRACHAT} cannot be reached: {type(error).__name__}"
        console.print(f"  {why}", style="dim", markup=False)
        return False
    return True


def _ultrachat(recipe: Recipe) -> list[Conversation]:
    from datasets import load_dataset  # noqa: PLC0415

    rows = load_dataset(ULTRACHAT, split=SPLIT).shuffle(seed=recipe.seed)
    return [row["messages"] for row in rows.select(range(recipe.samples))]


def tokenize(rows: Sequence[Conversation], most: int, model: Path) -> tuple[tuple[int, ...], ...]:
    """Ids of each conversation in the chat form of the model, or of DeepSeek-V4 if it has none.

    Args:
        rows: conversations.
        most: ids of each that are kept.
        model: folder with the tokenizer.
    """
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    template = tokenizer.chat_template or TEMPLATE.read_text(encoding="utf-8")
    tokens = []
    for row in rows:
        text = tokenizer.apply_chat_template(row, chat_template=template, tokenize=False)
        tokens.append(tuple(tokenizer.encode(text, add_special_tokens=False)[:most]))
    return tuple(tokens)
