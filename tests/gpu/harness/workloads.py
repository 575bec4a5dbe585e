"""Workloads of published acceptance rates: their prompts, how they are asked, what came back.

Prompts of data sets are not ours to ship. Who has them brings a folder with one file each, and the
record of a test holds the file's hash.
"""

from __future__ import annotations

import hashlib
import json
import random
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tests.gpu.harness.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FILE = Path(__file__).with_name("workloads.toml")
CHAT, COMPLETION, RANDOM = "chat", "completion", "random"
PATHS = {CHAT: "/v1/chat/completions", COMPLETION: "/v1/completions", RANDOM: "/v1/completions"}
WANTED = {CHAT: "messages", COMPLETION: "prompt"}
SEED = 20260523
LEAST_ID = 1000  # below are special tokens and single bytes
Post: TypeAlias = "Callable[[str, dict[str, Any]], Any]"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How prompts are asked, at temperature 0.

    Attributes:
        name: as in bands.toml.
        endpoint: chat, completion, or random: token ids that are made here.
        tokens: the most of an answer; exactly so many of a random prompt.
        together: concurrencies.
        prompts: what a line of the file has, for whoever makes it.
        thinking: of a chat; None elsewhere.
        input, count: tokens of a random prompt, and how many prompts.
    """

    name: str
    endpoint: str
    tokens: int
    together: tuple[int, ...]
    prompts: str
    thinking: bool | None = None
    input: int = 0
    count: int = 0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Token ids of one request: asked, and answered; and how the answer reads."""

    prompt: tuple[int, ...]
    came: tuple[int, ...]
    text: str = ""


def load_workloads(path: Path = FILE) -> dict[str, Workload]:
    """The workloads as data.

    Raises:
        InputError: a row has an unknown endpoint, or a chat that does not say if it thinks.
    """
    rows = tomllib.loads(path.read_text(encoding="utf-8"))
    found = {
        name: Workload(name=name, **row | {"together": tuple(row["together"])})
        for name, row in rows.items()
    }
    for name, one in found.items():
        if one.endpoint not in PATHS or (one.endpoint == CHAT) != (one.thinking is not None):
            raise InputError(
                f"workload {name}: a chat says whether it thinks, nothing else does",
                where=str(path),
                remedy=f"endpoints are {', '.join(PATHS)}",
            )
    return found


def read_prompts(
    workload: Workload, folder: Path, vocabulary: int
) -> tuple[list[dict[str, Any]], str]:
    """What is asked, and the SHA-256 of it in hex.

    Args:
        workload: random ones need no file.
        folder: has ``NAME.jsonl``.
        vocabulary: size of the model's.

    Raises:
        FileNotFoundError: the file is missing.
        InputError: a line is not what the workload asks for, or there is none.
    """
    if workload.endpoint == RANDOM:
        source = random.Random(f"{SEED} {workload.name}")  # noqa: S311 - not a secret
        bodies: list[dict[str, Any]] = [
            {
                "prompt": [source.randrange(LEAST_ID, vocabulary) for _ in range(workload.input)],
                "ignore_eos": True,
            }
            for _ in range(workload.count)
        ]
        return bodies, hashlib.sha256(json.dumps(bodies).encode()).hexdigest()
    path = folder / f"{workload.name}.jsonl"
    data = path.read_bytes()
    wanted = WANTED[workload.endpoint]
    bodies = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            bodies.append({wanted: json.loads(line)[wanted]})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"line {number} is not a prompt: {type(error).__name__}: {error}",
                where=str(path),
                remedy=f"{workload.name} needs {workload.prompts}",
            ) from None
    if not bodies:
        raise InputError("no prompts", where=str(path), remedy=f"it needs {workload.prompts}")
    return bodies, hashlib.sha256(data).hexdigest()


def ask_all(
    post: Post, workload: Workload, bodies: Sequence[dict[str, Any]], together: int
) -> list[Reply]:
    """Send every prompt once, at most ``together`` at a time, in their order.

    Args:
        post: sends a JSON body to a path of the server and returns the answer.
        workload: how they are asked.
        bodies: of :func:`read_prompts`.
        together: concurrency.
    """
    settings: dict[str, Any] = {
        "model": "m", "max_tokens": workload.tokens, "temperature": 0, "return_token_ids": True,
    }  # fmt: skip
    if workload.thinking is not None:
        settings["chat_template_kwargs"] = {"thinking": workload.thinking}
    if workload.thinking:
        settings["reasoning_effort"] = "high"

    def send(body: dict[str, Any]) -> Reply:
        answer = post(PATHS[workload.endpoint], settings | body)
        choice = answer["choices"][0]
        chat = workload.endpoint == CHAT
        return Reply(
            prompt=tuple((answer if chat else choice)["prompt_token_ids"]),
            came=tuple(choice["token_ids"]),
            text=(choice["message"]["content"] if chat else choice["text"]) or "",
        )

    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(send, bodies))
