"""Variants of the tiny checkpoint: every row changes what it says and nothing else."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.support.checkpoint_engine import SMALL, make_job, tree_of
from tests.support.variants import (
    VARIANTS,
    Change,
    apply_changes,
    cached_variant,
    downcast,
    halve_global_scales,
    load_variants,
    split_rows,
    variant_path,
)
from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.errors import RecipeError, ToolEnvironmentError
from vllm_forge.checkpoints.fixtures.cached import BF16, FIXTURES, fixture, fixture_path, is_whole
from vllm_forge.checkpoints.fixtures.tiny import TINY
from vllm_forge.checkpoints.quantize.quantizer import quantize
from vllm_forge.checkpoints.tensors import in_memory
from vllm_forge.host.files import folder_digest
from vllm_forge.project import Project
from vllm_forge.serve.rules import divisible

if TYPE_CHECKING:
    from vllm_forge.checkpoints.checkpoint import Checkpoint
    from vllm_forge.checkpoints.fixtures.tiny import TinySpec

ROWS = load_variants()
# The stand-in's scales are not the tools': halving has a test of its own.
DERIVED = [n for n, row in ROWS.items() if row.change and n != "split-global-scales"]
GROUPS = {
    f"group_{number}": {"targets": ["x"], "weights": {"actorder": None}, "input_activations": {}}
    for number in (0, 1)
}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """What the tools would make, by a stand-in; with the parts of the config that rows change."""
    folder = tmp_path_factory.mktemp("card")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_FORGE_CACHE", str(folder / "cache"))
        quantize(make_job(folder / "bf16"), folder / "card")
    config = json.loads((folder / "card" / "config.json").read_text())
    config["quantization_config"] |= {"config_groups": GROUPS, "scale_fmt": "ue8m0"}
    (folder / "card" / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder / "card")


def only(change: dict[str, Any]) -> list[Change]:
    return [Change.model_validate(change)]


@pytest.mark.parametrize("name", DERIVED)
def test_every_row_changes_something_and_nothing_twice(
    name: str, card: Checkpoint, tmp_path: Path
) -> None:
    before = tree_of(card.local.path)
    changes = [
        # The small model has half of the experts; its w4a16 is not made here.
        change.model_copy(update={"drop": (change.drop or "").replace("[4-7]", "[23]") or None})
        for change in ROWS[name].change
    ]
    apply_changes(card, changes, tmp_path / "variant")
    made = Checkpoint.open(tmp_path / "variant")
    same_tensors = {n: (t.dtype, t.shape, t.read()) for n, t in made.tensors.items()} == {
        n: (t.dtype, t.shape, t.read()) for n, t in card.tensors.items()
    }
    edits_config = any(c.set_ or c.transform == "literal_ignore" for c in changes)
    edits_tensors = any(c.drop or c.rename or c.on for c in changes)
    assert same_tensors == (not edits_tensors)
    assert (made.config == card.config) == (not edits_config)
    assert tree_of(card.local.path) == before
    assert not (tmp_path / "variant" / "manifest.json").exists()


def test_files_that_stay_are_shared_and_read_only(card: Checkpoint, tmp_path: Path) -> None:
    apply_changes(card, only({"drop": r"^mtp\."}), tmp_path / "variant")
    inodes = {card.local.files[name].stat().st_ino for name in card.shards}
    variant = Checkpoint.open(tmp_path / "variant")
    shared = [name for name in variant.shards if variant.local.files[name].stat().st_ino in inodes]
    assert len(shared) == len(card.shards) - 1
    assert all(path.stat().st_mode & 0o222 == 0 for path in (tmp_path / "variant").iterdir())


def test_a_change_that_matches_nothing_is_refused(card: Checkpoint, tmp_path: Path) -> None:
    for change in ({"drop": "nothing"}, {"set": {"model_type": '"deepseek_v4"'}}):
        with pytest.raises(RecipeError, match="matches nothing"):
            apply_changes(card, only(change), tmp_path / "variant")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"drop": "a", "rename": ["a", "b"]},
        {"transform": "downcast"},
        {"transform": "literal_ignore", "on": "a"},
        {"transform": "no_such", "on": "a"},
        {"delete": "a"},
    ],
)
def test_a_change_is_one_thing(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Change.model_validate(change)


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


@given(codes=st.lists(st.integers(16, 0x7E), min_size=1, max_size=20), divisor=st.floats(1, 1e6))
def test_halving_keeps_every_weight(codes: list[int], divisor: float) -> None:
    """weight = code x block scale / global scale; both scales halve, exactly."""
    scale = in_memory("x.weight_scale", "F8_E4M3", (len(codes),), bytes(codes))
    shared = in_memory("x.weight_global_scale", "F32", (), struct.pack("<f", divisor))
    (halved,) = halve_global_scales(scale)
    (divided,) = halve_global_scales(shared)
    (before,) = struct.unpack("<f", struct.pack("<f", divisor))
    (after,) = struct.unpack("<f", b"".join(divided.chunks()))
    assert after == before / 2
    for old, new in zip(codes, b"".join(halved.chunks()), strict=True):
        assert e4m3(new) == e4m3(old) / 2


def test_a_scale_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot be halved"):
        halve_global_scales(in_memory("x.weight_scale", "F8_E4M3", (2,), bytes([16, 15])))


def as_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


@example(1 + 2.0**-8)  # halfway: down to the even one
@example(1 + 3 * 2.0**-8)  # halfway: up to the even one
@given(st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126))
def test_downcast_is_to_nearest_even(value: float) -> None:
    (made,) = downcast(in_memory("x", "F32", (1,), struct.pack("<f", value)))
    (wide,) = struct.unpack("<I", struct.pack("<f", value))
    down, up = wide >> 16, (wide >> 16) + 1
    errors = [abs(value - as_float(bits << 16)) for bits in (down, up)]
    tie = down if down % 2 == 0 else up
    expected = tie if errors[0] == errors[1] else min((down, up), key=lambda b: errors[b - down])
    assert int.from_bytes(b"".join(made.chunks()), "little") == expected


def test_rows_become_tensors() -> None:
    rows = split_rows(in_memory("a.w2.weight", "U8", (2, 3), b"abcdef"))
    assert [(r.name, r.shape, b"".join(r.chunks())) for r in rows] == [
        ("a.w2.0.weight", (3,), b"abc"),
        ("a.w2.1.weight", (3,), b"def"),
    ]


class TestRows:
    def test_parents_come_first_and_every_fault_says_what_it_breaks(self) -> None:
        for name, row in ROWS.items():
            assert row.about
            assert bool(row.parent) <= (row.parent in ROWS)
            if row.parent:
                assert row.breaks or name == "nvfp4a16-no-mtp", name

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ('parent = "card"', 'parent = "no-input-scales"', "is before its parent"),
            ('made = "native"', "", "neither made nor changed"),
            ("about =", "abuot =", "not a file of variants"),
        ],
    )
    def test_a_wrong_row_is_refused(self, tmp_path: Path, old: str, new: str, said: str) -> None:
        path = tmp_path / "variants.toml"
        path.write_text(VARIANTS.read_text().replace(old, new, 1))
        with pytest.raises(RecipeError, match=said):
            load_variants(path)

    def test_names_that_others_rely_on(self) -> None:
        names = (
            "card card-no-activations w4a16-fp8-mtp nvidia-modelopt native-fp8-mxfp4 redhat-no-mtp "
            "partial-mtp dspark global-scale-shape split-global-scales literal-ignore "
            "actorder-static downcast"
        )
        assert set(names.split()) <= set(ROWS)

    def test_config_paths_exist_in_what_the_recipes_write(self) -> None:
        paths = [p for row in ROWS.values() for c in row.change for p in (c.set_ or {})]
        known = r"quantization_config\.|num_nextn_predict_layers$"
        assert all(re.match(known, path) for path in paths)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_a_rank_gets_the_same_of_each_width(gpus: int) -> None:
    config, due = TINY.split_over(gpus).config(), TINY.config()
    for name in ("num_attention_heads", "o_groups", "moe_intermediate_size"):
        assert config[name] / gpus == due[name] / 2
    assert all(count % gpus == 0 for count in divisible(config).values())
    assert TINY.split_over(2) == TINY


class TestCache:
    def test_bf16_takes_no_tools(self, root: Path, cache: Path) -> None:
        path = fixture(Project(root), BF16, SMALL)
        assert path.is_relative_to(cache)
        assert Checkpoint.open(path).config == SMALL.config()

    def test_what_takes_tools_says_so(self, root: Path) -> None:
        with pytest.raises(ToolEnvironmentError, match="'card' is made by the") as caught:
            cached_variant(Project(root), "redhat-no-mtp", SMALL)
        assert caught.value.remedy == "run: nox -s test -- --checkpoints"

    def test_an_unknown_one_gets_a_suggestion(self, root: Path) -> None:
        with pytest.raises(RecipeError, match="did you mean 'card'"):
            fixture_path(Project(root), "crad")

    def test_tests_find_the_fixtures_of_the_command(self, root: Path) -> None:
        for name in FIXTURES:
            assert variant_path(Project(root), name) == fixture_path(Project(root), name)

    def test_each_is_made_once_and_its_parent_too(self, root: Path, card: Checkpoint) -> None:
        calls = []

        def make(_project: Project, name: str, spec: TinySpec, made: str, folder: Path) -> None:
            calls.append((name, made))
            apply_changes(card, only({"set": {"note": '"made"'}}), folder)

        for _ in range(2):
            for name in ("redhat-no-mtp", "no-aliases"):
                cached_variant(Project(root), name, SMALL, make)
        assert calls == [("card", "recipe nvfp4-fp8-mtp")]

    @pytest.mark.parametrize("damage", ["byte", "file", "more", "seal"])
    def test_one_that_was_changed_is_made_again(self, root: Path, cache: Path, damage: str) -> None:
        """Of all that vLLM loads for the record of verdicts."""
        path = fixture(Project(root), BF16, SMALL)
        before = folder_digest(path)
        config, seal = path / "config.json", path.with_name(f"{path.name}.json")
        match damage:
            case "byte":
                config.write_bytes(config.read_bytes().replace(b"1", b"2", 1))
            case "file":
                config.unlink()
            case "more":
                (path / "adapter.json").touch()
            case _:
                seal.write_text("{}")
        assert not is_whole(path)
        assert folder_digest(fixture(Project(root), BF16, SMALL)) == before
        assert is_whole(path)

    def test_the_place_depends_on_what_it_is_made_from(self, root: Path, tmp_path: Path) -> None:
        other = tmp_path / "root"
        (other / "docker" / "locks").mkdir(parents=True)
        (other / "docker" / "locks" / "quantize.txt").write_text("another lock\n")
        assert variant_path(Project(root), "downcast") != variant_path(Project(other), "downcast")
        assert variant_path(Project(root), BF16) == variant_path(Project(other), BF16)
        assert variant_path(Project(root), BF16) != variant_path(Project(root), BF16, SMALL)
