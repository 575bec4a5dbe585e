"""The model of known acceptance: its weights do what its automaton counts, in exact arithmetic."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.gpu.models import exact_mtp as exact
from tests.gpu.models.exact_checkpoint import bfloat16

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = pytest.mark.xdist_group("exact-mtp")  # one worker builds what its fixtures have

LAST = 5


def weights(folder: Path) -> dict[str, NDArray[np.float64]]:
    """By numpy alone: safetensors gives BF16 no dtype there."""
    data = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name, row in header.items():
        start, end = row["data_offsets"]
        halves = np.frombuffer(data[8 + size + start : 8 + size + end], dtype="<u2")
        wide = (halves.astype(np.uint32) << 16).view(np.float32)
        found[name] = wide.astype(np.float64).reshape(row["shape"])
    return found


def norm(values: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = values / np.sqrt(
        np.mean(values * values, axis=-1, keepdims=True) + 1e-6
    )
    return scaled


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exact")
    return {variant: exact.write(root / variant, variant) for variant in exact.VARIANTS}


def draft(
    w: dict[str, NDArray[np.float64]], hidden: NDArray[np.float64], token: int
) -> tuple[NDArray[np.float64], int]:
    """One step of the MiMo head whose block adds zero: next hidden state and proposed token."""
    embedding = norm(w["model.embed_tokens.weight"][token])
    state = norm(w[exact.INPUT] @ np.concatenate([norm(hidden), embedding]))
    return state, int(np.argmax(w["lm_head.weight"] @ state))


def test_target_is_the_permutation_by_a_wide_gap(folders: dict[str, Path]) -> None:
    w = weights(folders["token"])
    logits = norm(w["model.embed_tokens.weight"]) @ w["lm_head.weight"].T
    assert np.argmax(logits, axis=1).tolist() == exact.permutation()
    best, second = np.sort(logits, axis=1)[:, -1], np.sort(logits, axis=1)[:, -2]
    assert (best - second).min() > 200


def test_blocks_add_zero(folders: dict[str, Path]) -> None:
    w = weights(folders["token"])
    for prefix in ("model.layers.0.", exact.MTP):
        assert not w[f"{prefix}self_attn.o_proj.weight"].any()
        assert not w[f"{prefix}mlp.down_proj.weight"].any()
        assert w[f"{prefix}self_attn.q_proj.weight"].any()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("variant", exact.VARIANTS)
def test_automaton_counts_what_the_weights_do(
    variant: exact.Variant, k: int, folders: dict[str, Path]
) -> None:
    """Replay 200 tokens through the weights, step by step as a proposer does."""
    w, pi = weights(folders[variant]), exact.permutation()
    tokens, prior, drafts, per = [pi[LAST]], LAST, 0, [0] * k
    while len(tokens) < 200:
        state, token = w["model.embed_tokens.weight"][prior], tokens[-1]
        proposed = []
        for _ in range(k):
            state, token = draft(w, state, token)
            proposed.append(token)
        for place, guess in enumerate(proposed):
            if guess != pi[tokens[-1]]:
                break
            tokens.append(guess)
            per[place] += 1
        prior = tokens[-1]
        tokens.append(pi[prior])
        drafts += 1
    counted = exact.expected(variant, LAST, 200, k)
    assert (drafts, tuple(per)) == (counted.drafts, counted.per_position)
    assert list(counted.tokens) == exact.orbit(LAST, 200) == tokens[:200]


@pytest.mark.parametrize(
    ("variant", "k", "rate"),
    [("token", 1, 1.0), ("token", 2, 1.0), ("hidden", 2, 1.0), ("wrong", 2, 0.0)],
)
def test_known_rates(variant: exact.Variant, k: int, rate: float) -> None:
    counted = exact.expected(variant, LAST, 1000, k)
    assert counted.accepted == rate * counted.draft_tokens


def test_fraction_is_neither_none_nor_all() -> None:
    counted = exact.expected("fraction", LAST, 1201, 1)
    assert counted.accepted / counted.draft_tokens == pytest.approx(5 / 7, abs=0.002)


def test_a_hidden_state_off_by_one_is_seen(folders: dict[str, Path]) -> None:
    """What the variant ``hidden`` is for: ``token`` does not notice."""
    pi = exact.permutation()
    inverse = [pi.index(token) for token in range(exact.SIZE)]
    for variant, right in (("hidden", False), ("token", True)):
        w = weights(folders[variant])
        shifted = w["model.embed_tokens.weight"][inverse[LAST]]
        assert (draft(w, shifted, pi[LAST])[1] == pi[pi[LAST]]) is right


def test_the_library_reads_it_and_left_out_tensors_are_gone(tmp_path: Path) -> None:
    folder = exact.write(tmp_path / "m", "token", lacks=(exact.MTP,), zeroed=("lm_head.",))
    found = weights(folder)
    assert not any(name.startswith(exact.MTP) for name in found)
    assert not found["lm_head.weight"].any()
    with pytest.raises(Exception, match=r"(?i)bf16|bfloat16"):
        load_file(folder / "model.safetensors")  # numpy has no BF16: the header was understood


def test_a_value_that_would_be_rounded_is_refused() -> None:
    with pytest.raises(ValueError, match="not a BF16 value"):
        bfloat16(0.1)
