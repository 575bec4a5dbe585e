"""The MoE of known tokens: its files compute what it says, and every planted fault shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.gpu.models import exact_moe as exact
from tests.gpu.models.exact_checkpoint import INT4, NVFP4
from tests.support.moe_forward import Model, norm, read_raw

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = pytest.mark.xdist_group("exact-moe")  # one worker builds what its fixtures have

ASKED = np.arange(1, exact.TOKENS)
RIGHT = np.array([exact.following(int(token)) for token in ASKED])
SCHEMES = {"nvfp4": NVFP4, "int4": INT4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exact-moe")
    return {name: exact.write(root / name, scheme) for name, scheme in SCHEMES.items()}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    return {name: Model.read(folder) for name, folder in folders.items()}


def wrong(model: Model) -> NDArray[np.int64]:
    """Tokens that are answered wrongly."""
    with np.errstate(invalid="ignore"):
        tokens: NDArray[np.int64] = ASKED[np.argmax(model.logits(ASKED), axis=1) != RIGHT]
    return tokens


def users(expert: int, layer: int = 0) -> set[int]:
    """Tokens that reach an expert of a layer."""
    found = set()
    for token in ASKED.tolist():
        here = token
        for _ in range(layer):
            here = exact.step(here)
        if expert in exact.chosen(layer, here):
            found.add(token)
    return found


def test_one_cycle_has_all_tokens_but_zero() -> None:
    assert sorted(exact.orbit(5, exact.TOKENS - 1)) == ASKED.tolist()
    assert exact.orbit(5, exact.TOKENS - 1)[-1] == 5


@pytest.mark.parametrize("name", SCHEMES)
def test_every_token_is_followed_by_the_one_that_is_said(
    name: str, models: dict[str, Model]
) -> None:
    """By 1024 against exactly 0: nothing was rounded on the way."""
    logits = models[name].logits(ASKED)
    assert np.argmax(logits, axis=1).tolist() == RIGHT.tolist()
    ordered = np.sort(logits, axis=1)
    assert set(ordered[:, -1]) == {float(exact.SIZE)}
    assert set(ordered[:, -2]) == {0.0}
    hidden = models[name].hidden(ASKED)
    assert hidden.tolist() == models[name].plain["model.embed_tokens.weight"][RIGHT].tolist()


def test_the_router_chooses_two_experts_each_by_the_same_weight(models: dict[str, Model]) -> None:
    model = models["nvfp4"]
    load = np.zeros(exact.EXPERTS)
    for layer in range(exact.LAYERS):
        rows = model.plain["model.embed_tokens.weight"][ASKED]
        scores = rows @ model.plain[f"model.layers.{layer}.mlp.gate.weight"].T
        for token, row in zip(ASKED.tolist(), scores, strict=True):
            first, second = exact.chosen(layer, token)
            assert first != second
            assert np.flatnonzero(row == exact.FIRED).tolist() == sorted((first, second))
            assert np.count_nonzero(row) == 2
            load[[first, second]] += 1
    assert load.min() > 0.5 * load.mean()


def test_partial_sums_of_gates_have_few_bits(models: dict[str, Model]) -> None:
    """Along K in chunks of 16 every partial sum is a BF16 value, whoever adds them up."""
    weight, rows = models["nvfp4"].experts[0, 3, "gate"], exact.WALSH
    for token in (1, 77, 300):
        terms = (weight * np.array(rows[token])).reshape(exact.TOKENS, -1, 16).sum(axis=2)
        in_units = np.cumsum(terms, axis=1) / exact.GATE / 16
        assert (in_units == np.round(in_units)).all()
        assert np.abs(in_units).max() <= 64


def test_inputs_are_exact_in_fp4(folders: dict[str, Path]) -> None:
    """The greatest input of a group has code 6 and scale 448, times a power of two."""
    for name, (_, array) in read_raw(folders["nvfp4"]).items():
        if name.endswith("input_global_scale"):
            wanted = exact.FIRED**2 if "down" in name else 1.0
            assert 448 * 6 / float(array.item()) == wanted


def test_scales_take_turns(folders: dict[str, Path]) -> None:
    """So that a scale of another group, row or expert is another number."""
    raw = read_raw(folders["nvfp4"])
    first = raw["model.layers.0.mlp.experts.0.gate_proj.weight_scale"][1]
    other = raw["model.layers.0.mlp.experts.1.gate_proj.weight_scale"][1]
    assert (first[:, 1:] != first[:, :-1]).all()
    assert (first[1:] != first[:-1]).all()
    assert (first != other).all()


def swap_experts(model: Model) -> set[int]:
    for part in ("gate", "up", "down"):
        one, two = model.experts[0, 2, part], model.experts[0, 7, part]
        model.experts[0, 2, part], model.experts[0, 7, part] = two, one
    return users(2) ^ users(7)


def swap_down(model: Model) -> set[int]:
    model.experts[0, 4, "down"] = model.experts[0, 5, "down"]
    return users(4)


def swap_gate(model: Model) -> set[int]:
    model.experts[1, 4, "gate"] = model.experts[1, 5, "gate"]
    return users(4, 1)


def swap_halves(model: Model) -> set[int]:
    gate, up = model.experts[0, 6, "gate"], model.experts[0, 6, "up"]
    model.experts[0, 6, "gate"], model.experts[0, 6, "up"] = up, gate
    return users(6)


def zero_expert(model: Model) -> set[int]:
    model.experts[1, 9, "down"] = np.zeros_like(model.experts[1, 9, "down"])
    return users(9, 1)


def lose_half_of_k(model: Model) -> set[int]:
    """As where one part of a sum that thread blocks share is lost."""
    weight = model.experts[0, 3, "up"].copy()
    weight[:, exact.SIZE // 2 :] = 0
    model.experts[0, 3, "up"] = weight
    return users(3)


def scale_down(model: Model) -> set[int]:
    """One block scale of a down projection by its least step: 16 weights of 524,288."""
    weight = model.experts[0, 8, "down"].copy()
    weight[100, 16:32] *= 1.125
    model.experts[0, 8, "down"] = weight
    reached = {exact.neuron(8, place) for place in range(16, 32)} & users(8)
    # A weight of zero stays what it is.
    return {t for t in reached if weight[100, exact.neuron(8, t)] != 0}


def scale_gate(model: Model) -> set[int]:
    """One block scale of a gate projection that is doubled."""
    weight, token = model.experts[0, 8, "gate"].copy(), min(users(8))
    weight[exact.neuron(8, token), 64:80] *= 2
    model.experts[0, 8, "gate"] = weight
    return {token}


def not_a_number(model: Model) -> set[int]:
    weight = model.experts[1, 1, "down"].copy()
    weight[5] = np.nan
    model.experts[1, 1, "down"] = weight
    return users(1, 1)


FAULTS: list[Callable[[Model], set[int]]] = [
    swap_experts, swap_down, swap_gate, swap_halves, zero_expert, lose_half_of_k, scale_down,
    scale_gate, not_a_number,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_token_that_meets_a_fault_is_wrong(
    fault: Callable[[Model], set[int]], models: dict[str, Model]
) -> None:
    model = models["nvfp4"].copy()
    met = fault(model)
    assert met
    assert set(wrong(model).tolist()) == met


@pytest.mark.parametrize("layer", range(exact.LAYERS))
def test_a_stale_row_is_wrong(layer: int, models: dict[str, Model]) -> None:
    """The output of another token, in one row."""
    model = models["nvfp4"].copy()

    def stale(output: NDArray[np.float64], where: int) -> NDArray[np.float64]:
        output = output.copy()
        if where == layer:
            output[1::2] = output[0:-1:2]
        return output

    model.moe_output = stale
    assert wrong(model).tolist() == ASKED[1::2].tolist()


@pytest.mark.parametrize("layer", range(exact.LAYERS))
def test_one_step_of_one_element_is_wrong(layer: int, models: dict[str, Model]) -> None:
    """The head decodes it: 2^-7 in one of 1024 elements of a layer's output, either sign."""
    for sign in (1, -1):
        model = models["nvfp4"].copy()

        def off(output: NDArray[np.float64], where: int, sign: int = sign) -> NDArray[np.float64]:
            output = output.copy()
            if where == layer:
                output[:, 77] += sign * 2.0**-7
            return output

        model.moe_output = off
        assert wrong(model).tolist() == ASKED.tolist()


def test_what_it_cannot_see(models: dict[str, Model]) -> None:
    """An error of a gate that BF16 rounds away: one block scale by its least step."""
    model = models["nvfp4"].copy()
    weight = model.experts[0, 8, "gate"].copy()
    weight[exact.neuron(8, min(users(8))), 64:80] *= 1.125
    model.experts[0, 8, "gate"] = weight
    assert not len(wrong(model))


def test_a_wrong_expert_is_planted_as_asked(tmp_path: Path) -> None:
    """The positive control of the server tier."""
    model = Model.read(exact.write(tmp_path / "m", NVFP4, wrong_expert=4))
    assert set(wrong(model).tolist()) == users(4)


def test_the_draft_proposes_the_next_token_from_the_last_ones_embedding(
    models: dict[str, Model],
) -> None:
    plain, prefix = models["nvfp4"].plain, f"model.layers.{exact.LAYERS}."
    for name in ("self_attn.o_proj", "mlp.shared_experts.down_proj"):
        assert not plain[f"{prefix}{name}.weight"].any()
    rng = np.random.default_rng(1)
    hidden = norm(rng.standard_normal((len(ASKED), exact.SIZE)))  # whatever the target's is
    embedded = norm(plain["model.embed_tokens.weight"][ASKED])
    state = norm(np.hstack([embedded, hidden]) @ plain[f"{prefix}eh_proj.weight"].T)
    logits = state @ plain["lm_head.weight"].T
    assert np.argmax(logits, axis=1).tolist() == RIGHT.tolist()


def test_draft_experts_are_bf16_and_add_zero(folders: dict[str, Path]) -> None:
    raw = read_raw(folders["nvfp4"])
    rows = {n: row for n, row in raw.items() if f"layers.{exact.LAYERS}.mlp.experts." in n}
    assert len(rows) == 3 * exact.EXPERTS
    for name, (dtype, array) in rows.items():
        assert dtype == "BF16"
        assert bool(array.any()) == ("down" not in name)
