"""What a quantization starts from: a whole BF16 model, a row of recipes.toml, conversations."""

import hashlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from vllm_forge.checkpoints.architecture import all_tensors, has_dspark, require_deepseek_v4
from vllm_forge.checkpoints.checkpoint import Checkpoint, Folder
from vllm_forge.checkpoints.errors import ModelInputError, RecipeError
from vllm_forge.checkpoints.fixtures.tiny import TEMPLATE
from vllm_forge.checkpoints.tensors import INDEX, TensorSpec
from vllm_forge.errors import shortened
from vllm_forge.host import console, parse_json, printable, read_data, read_plain, suggestion
from vllm_forge.matrix import FrozenModel

SHOWN = 5  # problems
CHARACTERS = 200  # of a path, or of another's error
QUANTIZED = ("quantization_config", "compression_config")
# Where the drafter's loader looks for embedding and output head (vLLM 0.26.0,
# vllm/models/deepseek_v4/nvidia/mtp.py, WEIGHT_NAME_REMAPPING): name in the block -> whose bytes.
ALIASES = {"emb.tok_emb.weight": "embed.weight", "head.weight": "head.weight"}
RECIPES = Path(__file__).with_name("recipes.toml")
DRAFT = "{draft}"
SHIPPED = Path(__file__).with_name("data") / "conversations.jsonl"
ULTRACHAT, SPLIT = "HuggingFaceH4/ultrachat_200k", "train_sft"
AUTO = "auto"
ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_BYTES = 1 << 30
RENDER = Path(__file__).with_name("render.py")
# Of the process that renders: CPU time and bytes. 768 conversations take seconds and 1 GiB, most
# of both for imports.
LIMIT_S, MEMORY = 300, 1 << 34
Conversation = list[dict[str, str]]


def open_model(folder: Path) -> Checkpoint:
    """Open the model and compare it with what its config implies.

    Raises CheckpointUnreadableError: another model, or a file of it is missing or malformed.
    ModelInputError: a quantized one, shards that are not those of the index, or tensors that are
    missing, unknown, of the wrong shape, or of a dtype that has lost precision already.
    """
    checkpoint = Checkpoint.open(folder)
    refused = partial(ModelInputError, where=folder)
    require_deepseek_v4(checkpoint.config, str(folder))
    if any(checkpoint.config.get(key) is not None for key in QUANTIZED):
        remedy = "start from the BF16 model: convert the published FP8 one first"
        raise refused("the model is quantized already", remedy=remedy)
    for name in checkpoint.source.sizes:
        if name.endswith(".json"):  # is copied to the output
            checkpoint.source.json(name, any_value=True)
    unlisted = checkpoint.index is None and len(checkpoint.shards) > 1
    for missing in (INDEX,) if unlisted else checkpoint.missing_shards:
        raise refused(f"missing {missing}", remedy="fetch it again")
    if names := checkpoint.misplaced:
        where = f"{len(names)} tensors are not where it says, e.g. {names[0]}"
        remedy = "fetch index and shards of the same revision"
        raise refused(f"{INDEX} does not match the shards: {where}", remedy=remedy)
    if problems := list(_problems(checkpoint)):
        shown = shortened([f"- {problem}" for problem in problems], SHOWN)
        raise refused(
            "\n  ".join(["not the tensors that config.json describes:", *shown]),
            remedy="an interrupted download, or a conversion that dropped or changed tensors: "
            "make the BF16 model again",
        )
    return checkpoint


def _problems(checkpoint: Checkpoint) -> Iterator[str]:
    expected: dict[str, TensorSpec] = {t.name: t for t in all_tensors(checkpoint.config)}
    for name, origin in _aliases(checkpoint.config).items():
        if name in checkpoint.tensors:
            expected[name] = replace(expected[origin], name=name)
    for name, tensor in expected.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            yield f"{name} is missing"
        elif stored.shape != tensor.shape:
            yield f"{name} is {list(stored.shape)}, not {list(tensor.shape)}"
        elif stored.dtype not in {tensor.dtype, *(["F32"] if tensor.dtype == "BF16" else [])}:
            yield f"{name} is {stored.dtype}, not {tensor.dtype}"
    for name, stored in checkpoint.tensors.items():
        if name not in expected or stored.name != name:
            yield f"{stored.name} is not a tensor of this model"


def alias_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Aliases that the drafter needs and the model does not have: name -> whose bytes."""
    aliases = _aliases(checkpoint.config)
    return {name: source for name, source in aliases.items() if name not in checkpoint.tensors}


def _aliases(config: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"mtp.{index}.{leaf}": source
        for index in range(0 if has_dspark(config) else config["num_nextn_predict_layers"])
        for leaf, source in ALIASES.items()
    }


class Group(FrozenModel):
    """Modules that are quantized in one way; see the head of recipes.toml."""

    scheme: str = Field(description="preset of compressed-tensors")
    format: str = Field(description="how compressed-tensors stores it")
    tensors: str
    calibrate: tuple[str, ...]
    serve: tuple[str, ...]


class Recipe(FrozenModel):
    """One recipe; see the head of recipes.toml."""

    name: str
    about: str
    samples: int = Field(ge=1, description="conversations to calibrate with")
    tokens: int = Field(ge=1, description="of each conversation, at most")
    seed: int = Field(description="of their choice")
    scale_fmt: str = Field(description="in config.json; vLLM before 0.23 stops without it")
    ignore: tuple[str, ...] = Field(description="in config.json")
    group: tuple[Group, ...] = Field(min_length=1)

    def group_of(self, name: str) -> Group | None:
        """The group that a tensor belongs to, by its upstream name; None if it stays as it is."""
        for group in self.group:
            if re.fullmatch(rf"layers\.\d+\.{group.tensors}\.weight", name):
                return group
        return None

    def ignored(self, config: Mapping[str, Any]) -> list[str]:
        """The ignore list for a model, with the numbers of its draft layers."""
        first = config["num_hidden_layers"]
        drafts = range(first, first + config["num_nextn_predict_layers"])
        rows = []
        for row in self.ignore:
            rows += [row.replace(DRAFT, str(n)) for n in drafts] if DRAFT in row else [row]
        return rows


def load_recipe(name: str, path: Path = RECIPES) -> Recipe:
    """One row of the recipes, on top of those that it extends; RecipeError for another."""

    def parse(data: Any) -> Recipe:
        rows = data["recipe"]
        if name not in rows:
            what = f"unknown recipe {name!r}{suggestion(name, rows)}"
            raise RecipeError(what, where=path, remedy=f"recipes: {', '.join(rows)}")
        row = rows[name]
        while "extends" in row:
            row = {**rows[row.pop("extends")], **row}
        return Recipe.model_validate({"name": name, **row})

    return read_data(path, parse, RecipeError, what=f"recipe {name}", remedy="correct its row")


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
    refused = partial(RecipeError, where=str(path)[:CHARACTERS])
    try:
        lines = read_plain(path.resolve(), MOST_BYTES).decode("utf-8").split("\n")
        rows = [parse_json(line)["messages"] for line in lines if line.strip()]
        for row in rows:
            _check(row)
    except FileNotFoundError:
        raise refused("the file of conversations does not exist") from None
    except (OSError, RuntimeError) as error:  # the latter: links in a circle
        why = getattr(error, "strerror", "links in a circle")
        raise refused(f"the file of conversations cannot be read: {why}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"not a file of conversations: {type(error).__name__}: {error}"
        remedy = 'one JSON object per line: {"messages": [{"role": ..., "content": ...}, ...]}'
        raise refused(what, remedy=remedy) from None
    if len(rows) < samples:
        what = f"the recipe asks for {samples} conversations, here are {len(rows)}"
        raise refused(what, remedy="name a larger file with --data, or let ultrachat be reached")
    return rows[:samples]


def _check(row: Any) -> None:
    """Refuse what a chat template renders as nothing, without a word."""
    for message in row:
        if not isinstance(message["role"] + message["content"], str):
            raise TypeError("role and content are text")
        if (role := message["role"]) not in ROLES:
            raise ValueError(f"unknown role {role!r}: expected one of {', '.join(ROLES)}")
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
    question = {
        "model": str(model), "template": TEMPLATE.read_text(encoding="utf-8"), "rows": rows,
        "most": most, "limits": {"RLIMIT_CPU": LIMIT_S, "RLIMIT_DATA": MEMORY, "RLIMIT_CORE": 0},
    }  # fmt: skip
    argv = [sys.executable, "-P", str(RENDER)]
    done = subprocess.run(
        argv, input=json.dumps(question), capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        answer = json.loads(done.stdout.splitlines()[-1])
    elif done.returncode == -signal.SIGKILL:
        answer = {"error": f"they take more than {LIMIT_S} s of CPU time, or the host's memory"}
    else:
        answer = {"error": f"exit code {done.returncode}: {done.stderr[-CHARACTERS:]}"}
    refused = partial(ModelInputError, where=model)
    if "error" in answer:
        what = f"tokenizer or chat template fail: {printable(answer['error'])}"
        remedy = "take tokenizer.json, tokenizer_config.json and the template from the source"
        raise refused(what, remedy=remedy)
    tokens, vocabulary = answer["tokens"], Folder(model).config()["vocab_size"]
    remedy = "take config.json and the tokenizer from the same model"
    if not all(tokens):
        what = "the tokenizer and its template make nothing of a conversation"
        raise refused(what, remedy=remedy)
    if (largest := max(map(max, tokens), default=0)) >= vocabulary:
        what = f"the tokenizer gives ids up to {largest}, config.json has a vocabulary of"
        raise refused(f"{what} {vocabulary}", remedy=remedy)
    return tuple(map(tuple, tokens))
