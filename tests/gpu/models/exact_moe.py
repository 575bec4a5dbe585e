"""A small mixture of experts whose next token is known, and computed by its quantized experts.

GLM-4-MoE (vllm/model_executor/models/glm4_moe.py and glm4_moe_mtp.py): plain attention, which adds
zero here, a sigmoid router, a shared expert, and an MTP head. Token t < 512 has row t of a Hadamard
matrix as its embedding. In each layer the router chooses two experts for t, their gate and up
projections fire one neuron each, and their down projections add ``d + 2z`` and ``-2z``. ``d`` is
the next token's row less t's own, so that the residual becomes the next token's row, in whole
numbers; z is a row that no token has. Every other pair of experts leaves a z behind.

Nothing is rounded, in BF16 or with FP4 activations, so that the answer does not depend on kernel,
batch or order of sums: partial sums of a Walsh function over aligned blocks of 8 are multiples of
8. And the head is a syndrome decoder: tokens from 512 on have rows that no token has, times 2^21,
so that one element of the last hidden state that is off by one BF16 step makes one of them win.
A wrong token is therefore a wrong number, and a right token excludes one.

What it cannot see: attention and its cache, and an error of a gate or up projection that BF16
rounds away, e.g. one block scale by 12.5 % (2 of 1024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.gpu.models.exact_checkpoint import Projection, Scheme, Tensor, bfloat16, hadamard, save

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


SIZE = 1024  # of the hidden state: Marlin divides such a K among thread blocks
TOKENS = 512  # that can be asked for, but 0; also neurons of an expert
VOCABULARY = TOKENS + 2 * (SIZE - TOKENS)
LAYERS, EXPERTS = 2, 16
TAPS = 0x11  # x^9 + x^4 + 1 is primitive: one cycle of 511 tokens
HEADS, KV_HEADS, HEAD = 8, 2, 128
SYNDROME = 2.0**21  # a BF16 step, 2^-8, of one element outweighs the right token's 1024
GATE, DOWN = 2.0**-4, 2.0**-10  # what a weight of 1 stands for
FIRED = 64.0  # a neuron's gate, and less its up projection
# Rows of +1 and -1.
WALSH = hadamard(SIZE)


def step(token: int) -> int:
    """The next token by one layer: linear over GF(2), so that the draft's matrix is sparse."""
    return (token << 1 & TOKENS - 1) ^ (TAPS if token & TOKENS >> 1 else 0)


def following(token: int) -> int:
    """The token that the model generates after ``token``."""
    for _ in range(LAYERS):
        token = step(token)
    return token


def orbit(first: int, count: int) -> list[int]:
    """``count`` tokens that the model generates after ``first``."""
    tokens = []
    for _ in range(count):
        first = following(first)
        tokens.append(first)
    return tokens


def chosen(layer: int, token: int) -> tuple[int, int]:
    """The two experts of a token: the one that adds d + 2z, and the one that takes 2z away."""
    first = (token + layer) % EXPERTS
    return first, (first + 1 + (token // EXPERTS + layer) % (EXPERTS - 1)) % EXPERTS


def spare(layer: int, token: int) -> int:
    """The row z that a token's experts add and take away."""
    return TOKENS + (token + 37 * layer) % (SIZE - TOKENS)


def neuron(expert: int, place: int) -> int:
    """The token at which a neuron of an expert fires; its own inverse.

    The two halves of an expert, as two ranks have them, are swapped in every other expert, so that
    experts of a token may be on different ranks, and a sum over ranks has two terms.
    """
    return place ^ (EXPERTS * expert) ^ (TOKENS // 2 * (expert & 1))


def write(folder: Path, scheme: Scheme, *, wrong_expert: int | None = None) -> Path:
    """Write a checkpoint of about 100 MB and return its folder.

    Args:
        folder: is made.
        scheme: of the experts; the MTP head is BF16, as the card's.
        wrong_expert: of the first layer: it has the down projection of the next one.
    """
    return save(folder, tensors(scheme, wrong_expert), config(scheme), VOCABULARY)


def tensors(scheme: Scheme, wrong_expert: int | None = None) -> Iterator[Tensor]:
    """All tensors, as the checkpoint has them."""
    rows = [_bf16(row, 1) for row in WALSH]
    spares = range(TOKENS, SIZE)
    negative = [_bf16(WALSH[row], -1) for row in spares]
    yield _matrix("model.embed_tokens.weight", [*rows, *negative])
    yield _ones("model.norm.weight")
    heads = [_bf16(WALSH[row], sign * SYNDROME) for sign in (1, -1) for row in spares]
    yield _matrix("lm_head.weight", [*rows[:TOKENS], *heads])
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        yield from _block(prefix, layer)
        columns = _columns(layer)
        downs = [_down(layer, expert, columns) for expert in range(EXPERTS)]
        if layer == 0 and wrong_expert is not None:
            downs[wrong_expert] = downs[(wrong_expert + 1) % EXPERTS]
        for expert, down in enumerate(downs):
            gate, up = ([_values(neuron(expert, j), s) for j in range(TOKENS)] for s in (1, -1))
            weight = f"{prefix}mlp.experts.{expert}."
            for name, projection in (
                ("gate", Projection(rows=gate, unit=GATE, largest_input=1)),
                ("up", Projection(rows=up, unit=GATE, largest_input=1)),
                ("down", Projection(rows=down, unit=DOWN, largest_input=FIRED * FIRED)),
            ):
                yield from projection.tensors(f"{weight}{name}_proj.", scheme, expert)
    yield from _draft(f"model.layers.{LAYERS}.")


def config(scheme: Scheme) -> dict[str, object]:
    """config.json."""
    targets = [r"re:.*\.mlp\.experts\.\d+\.(gate|up|down)_proj$"]
    return {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe",
        "vocab_size": VOCABULARY, "hidden_size": SIZE, "intermediate_size": SIZE,
        "moe_intermediate_size": TOKENS, "num_hidden_layers": LAYERS, "first_k_dense_replace": 0,
        "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
        "attention_bias": False, "use_qk_norm": False, "hidden_act": "silu",
        "max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "num_nextn_predict_layers": 1, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None,
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": scheme.name,
            "quantization_status": "compressed", "kv_cache_scheme": None,
            "config_groups": {"group_0": {"targets": targets, **scheme.config()}},
            "ignore": [
                "lm_head", r"re:.*\.self_attn\..*", r"re:.*\.mlp\.gate$",
                r"re:.*\.shared_experts\..*", rf"re:.*\.layers\.{LAYERS}\..*",
            ],
        },
    }  # fmt: skip


def _values(row: int, sign: int) -> bytes:
    return bytes(sign * value + 2 for value in WALSH[row])


def _columns(layer: int) -> list[tuple[bytes, bytes, bytes]]:
    """Per token, its column of a down projection, plus 2 each, by what the expert does for it.

    Adds d + 2z; takes 2z away; is another. Neurons fire with -4096, and half of it counts.
    """
    found = []
    for token in range(TOKENS):
        here, there, z = WALSH[token], WALSH[step(token)], WALSH[spare(layer, token)]
        found.append(
            (
                bytes(2 - (b - a) // 2 - c for a, b, c in zip(here, there, z, strict=True)),
                bytes(2 + c for c in z),
                bytes(2 - c for c in z),
            )
        )
    return found


def _down(layer: int, expert: int, columns: Sequence[tuple[bytes, bytes, bytes]]) -> list[bytes]:
    """The down projection of an expert, [SIZE, TOKENS], plus 2 each."""
    picked = []
    for place in range(TOKENS):
        token = neuron(expert, place)
        experts = chosen(layer, token)
        picked.append(columns[token][experts.index(expert) if expert in experts else 2])
    joined = b"".join(picked)
    return [joined[row::SIZE] for row in range(SIZE)]


def _block(prefix: str, layer: int) -> Iterator[Tensor]:
    """What a layer has beside its experts; attention and the shared expert add exactly zero."""
    small = [_bf16(row, 2.0**-5) for row in WALSH]
    zero = bytes(2 * SIZE)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield _ones(f"{prefix}{name}.weight")
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        yield _matrix(f"{prefix}self_attn.{name}_proj.weight", small[: heads * HEAD])
    yield _matrix(f"{prefix}self_attn.o_proj.weight", [bytes(2 * HEADS * HEAD)] * SIZE)
    yield _matrix(f"{prefix}mlp.gate.weight", [_bf16(row, 1) for row in _router(layer)])
    yield Tensor(name=f"{prefix}mlp.gate.e_score_correction_bias", dtype="F32", shape=(EXPERTS,),
                 data=bytes(4 * EXPERTS))  # fmt: skip
    for name in ("gate", "up"):
        yield _matrix(f"{prefix}mlp.shared_experts.{name}_proj.weight", small[:TOKENS])
    yield _matrix(f"{prefix}mlp.shared_experts.down_proj.weight", [zero[: 2 * TOKENS]] * SIZE)


def _draft(prefix: str) -> Iterator[Tensor]:
    """The MTP head: from the last token's embedding alone; its block adds zero."""
    yield from _block(prefix, 0)
    small = b"".join(_bf16(row, 2.0**-5) for row in WALSH[:TOKENS])
    for expert in range(EXPERTS):
        weight = f"{prefix}mlp.experts.{expert}."
        for name in ("gate", "up"):
            yield Tensor(name=f"{weight}{name}_proj.weight", dtype="BF16", shape=(TOKENS, SIZE),
                         data=small)  # fmt: skip
        yield Tensor(name=f"{weight}down_proj.weight", dtype="BF16", shape=(SIZE, TOKENS),
                     data=bytes(2 * SIZE * TOKENS))  # fmt: skip
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield _ones(f"{prefix}{name}.weight")
    # Element o of the next token's row is the parity of next & o, and next is linear in the token.
    images = [following(1 << bit) for bit in range(TOKENS.bit_length() - 1)]
    projection = []
    for out in range(SIZE):
        source = sum(((image & out).bit_count() & 1) << bit for bit, image in enumerate(images))
        row = bytearray(2 * 2 * SIZE)  # of the embedding, then of the hidden state
        row[2 * source : 2 * source + 2] = bfloat16(1.0)
        projection.append(bytes(row))
    yield _matrix(f"{prefix}eh_proj.weight", projection)


def _router(layer: int) -> list[list[float]]:
    """[EXPERTS, SIZE]: a token's two experts get 64, whose sigmoid is 1, and the others 0."""
    sums = [[0] * SIZE for _ in range(EXPERTS)]
    for token in range(TOKENS):
        for expert in chosen(layer, token):
            sums[expert] = list(map(int.__add__, sums[expert], WALSH[token]))
    return [[value * FIRED / SIZE for value in row] for row in sums]


def _bf16(row: Sequence[float], factor: float) -> bytes:
    table = {value: bfloat16(value * factor) for value in set(row)}
    return b"".join(map(table.__getitem__, row))


def _matrix(name: str, rows: Sequence[bytes]) -> Tensor:
    return Tensor(name=name, dtype="BF16", shape=(len(rows), len(rows[0]) // 2),
                  data=b"".join(rows))  # fmt: skip


def _ones(name: str) -> Tensor:
    return Tensor(name=name, dtype="BF16", shape=(SIZE,), data=bfloat16(1.0) * SIZE)
