"""A tiny model whose draft acceptance is known exactly, and its accounting as an automaton.

The target's next token is a fixed permutation pi of the last one: embeddings are the rows of a
Hadamard matrix, every attention and MLP output is zero, and row v of the head is the embedding of
pi^-1(v). The gap between the best logit and the next is about the hidden size, 256, so that no
kernel, batch or precision flips a token. The draft is a MiMo MTP head (a Qwen2 block: it runs on
any GPU, vllm/model_executor/models/mimo_mtp.py) whose input projection decides what it proposes:

    token     pi of the last token, by its embedding alone: every draft is taken
    hidden    pi(pi(t)) from the target's hidden state at t, so that it is right only if hidden
              states and tokens are aligned
    wrong     never pi of the last token: the head runs, and no draft is taken
    fraction  right, but for three tokens of each cycle of twelve

Standard library only: the tests on a GPU host write the checkpoint themselves.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from tests.gpu.models.exact_checkpoint import Tensor, bfloat16, hadamard, save

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Variant: TypeAlias = Literal["token", "hidden", "wrong", "fraction"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
SIZE = 256  # vocabulary and hidden size
CYCLE, WRONG = 12, 3
HEADS, KV_HEADS, WIDTH = 4, 2, 256
MTP = "model.mtp_layers.0."
INPUT = f"{MTP}input_proj.weight"
SEED = 20260524
Rows: TypeAlias = "Sequence[Sequence[float]]"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What vLLM's counters must show for one request, and the tokens that it returns."""

    drafts: int
    draft_tokens: int
    accepted: int
    per_position: tuple[int, ...]
    tokens: tuple[int, ...]


def permutation() -> list[int]:
    """pi: cycles of twelve tokens, the last one shorter."""
    order = list(range(SIZE))
    random.Random(SEED).shuffle(order)  # noqa: S311 - a fixture, not a secret
    pi = [0] * SIZE
    for start in range(0, SIZE, CYCLE):
        cycle = order[start : start + CYCLE]
        for here, there in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            pi[here] = there
    return pi


def misled() -> frozenset[int]:
    """Tokens after which the draft of variant ``fraction`` is wrong: three of each full cycle."""
    pi, seen, found = permutation(), set[int](), set[int]()
    for start in range(SIZE):
        cycle, token = [], start
        while token not in seen:
            seen.add(token)
            cycle.append(token)
            token = pi[token]
        if len(cycle) == CYCLE:
            found.update(cycle[:WRONG])
    return frozenset(found)


def proposals(variant: Variant) -> list[int]:
    """The token that the draft proposes after each last token, with states and tokens aligned."""
    pi = permutation()
    off = (
        misled() if variant == "fraction" else frozenset(range(SIZE) if variant == "wrong" else ())
    )
    # pi is one to one, so pi of another token is never pi of this one.
    return [pi[(token + 1) % SIZE] if token in off else pi[token] for token in range(SIZE)]


def orbit(first: int, count: int) -> list[int]:
    """``count`` tokens that the target generates after ``first``."""
    pi, tokens = permutation(), []
    for _ in range(count):
        first = pi[first]
        tokens.append(first)
    return tokens


def expected(variant: Variant, last: int, count: int, k: int) -> Counts:
    """The accounting of a greedy request for ``count`` tokens after ``last``, by vLLM.

    Counted as if the last draft were not cut off by ``count``; see ``allowance``.
    """
    pi, propose = permutation(), proposals(variant)
    tokens = [pi[last]]  # of the prefill
    drafts, accepted, per = 0, 0, [0] * k
    while len(tokens) < count:
        guess, taken = tokens[-1], 0
        while taken < k:
            guess = propose[guess]
            if guess != pi[tokens[-1]]:
                break
            tokens.append(guess)
            per[taken] += 1
            taken += 1
        tokens.append(pi[tokens[-1]])
        drafts, accepted = drafts + 1, accepted + taken
    return Counts(
        drafts=drafts,
        draft_tokens=k * drafts,
        accepted=accepted,
        per_position=tuple(per),
        tokens=tuple(tokens[:count]),
    )


def allowance(requests: int) -> int:
    """By how many drafts a run may differ from ``expected``: two at the end of each request.

    The scheduler does not speculate past the end, so that a last step may lack its draft.
    """
    return 2 * requests


def tensors(variant: Variant) -> Iterator[tuple[str, Rows]]:
    """Names and values, as the checkpoint has them; one row for a vector."""
    pi, rows = permutation(), hadamard(SIZE)
    inverse = [pi.index(token) for token in range(SIZE)]
    yield "model.embed_tokens.weight", rows
    yield "model.norm.weight", [[1] * SIZE]
    yield "lm_head.weight", [rows[inverse[token]] for token in range(SIZE)]
    yield from _block("model.layers.0.")
    yield from _block(MTP)
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        yield f"{MTP}{name}.weight", [[1] * SIZE]
    # The head decodes the embedding of u as pi(u): to propose v, make the embedding of pi^-1(v).
    target = pi if variant == "hidden" else [inverse[token] for token in proposals(variant)]
    mapped, zero = _mapping(rows, target), [0.0] * SIZE
    # Its input is hidden state, then embedding.
    yield (
        INPUT,
        [[*row, *zero] if variant == "hidden" else [*zero, *row] for row in mapped],
    )


def write(
    folder: Path, variant: Variant, *, lacks: Sequence[str] = (), zeroed: Sequence[str] = ()
) -> Path:
    """Write a checkpoint of 2 MB and return its folder.

    Args:
        folder: is made.
        variant: of the draft.
        lacks: beginnings of the names of tensors to leave out.
        zeroed: the same, of tensors to fill with zeros.
    """
    kept = (
        Tensor(
            name=name,
            dtype="BF16",
            shape=(len(rows), len(rows[0])) if len(rows) > 1 else (len(rows[0]),),
            data=b"".join(
                bfloat16(0.0 if name.startswith(tuple(zeroed)) else value)
                for row in rows
                for value in row
            ),
        )
        for name, rows in tensors(variant)
        if not name.startswith(tuple(lacks))
    )
    return save(folder, kept, config(), SIZE)


def config() -> dict[str, object]:
    """config.json: MiMo's architecture on a plain Qwen2 configuration."""
    return {
        "architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "vocab_size": SIZE,
        "hidden_size": SIZE, "intermediate_size": WIDTH, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": SIZE // HEADS,
        "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_sliding_window": False, "num_nextn_predict_layers": 1, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip


def _mapping(rows: list[list[int]], target: list[int]) -> list[list[float]]:
    """The matrix that maps row t to row target[t]: sum of target row x source row / size.

    Rows are Walsh functions, so that each product is one too; entries are multiples of 1/128,
    at most 1.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    wanted = [[rows[target[token]][out] for token in range(SIZE)] for out in range(SIZE)]
    return [[sum(map(int.__mul__, row, column)) / SIZE for column in columns] for row in wanted]


def _block(prefix: str) -> Iterator[tuple[str, Rows]]:
    """A Qwen2 block that adds exactly zero: its two output projections are zero."""
    head = SIZE // HEADS
    noise = random.Random(prefix)  # noqa: S311
    yield f"{prefix}input_layernorm.weight", [[1] * SIZE]
    yield f"{prefix}post_attention_layernorm.weight", [[1] * SIZE]
    for name, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        yield f"{prefix}self_attn.{name}_proj.weight", _noise(noise, count * head)
        yield f"{prefix}self_attn.{name}_proj.bias", [[0] * (count * head)]
    yield f"{prefix}self_attn.o_proj.weight", [[0] * (HEADS * head)] * SIZE
    yield f"{prefix}mlp.gate_proj.weight", _noise(noise, WIDTH)
    yield f"{prefix}mlp.up_proj.weight", _noise(noise, WIDTH)
    yield f"{prefix}mlp.down_proj.weight", [[0] * WIDTH] * SIZE


def _noise(source: random.Random, rows: int) -> list[list[float]]:
    """Small values that BF16 has: multiples of 1/1024 below 1/8."""
    return [[source.randrange(-127, 128) / 1024 for _ in range(SIZE)] for _ in range(rows)]
