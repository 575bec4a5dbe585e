"""Every way in which the family's artifacts went wrong is named by its number.

Broken layouts are the rows of variants.toml, on tensors that are all ones. What vLLM itself does
with the ones that the tools make is in records/verdicts.json.
"""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.layouts import (
    MADE,
    SMALL,
    compressed,
    layout,
    layout_config,
    profile_of,
    write_layout,
)
from tests.support.layouts import NVFP4 as NVFP4_GROUP
from tests.support.variants import Change, apply_changes, check_id, load_variants
from vllm_forge.checkpoints.architecture import Config
from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.inspect.checks_config import activations
from vllm_forge.checkpoints.inspect.findings import Effect, Finding, Scope, summarize
from vllm_forge.checkpoints.inspect.inspection import applies, find_all
from vllm_forge.checkpoints.inspect.manifest import nearest
from vllm_forge.checkpoints.inspect.profile import Format

if TYPE_CHECKING:
    from collections.abc import Callable

DRAFTS = "num_nextn_predict_layers"  # a config without it has no drafter
RELEASES = ("0.22.1", "0.26.0", "0.33.0")
REFUSES, CORRUPTS, LOSES, DEPARTS, NOTES = Effect
# Variant -> gate, effect, scope, and the releases that it is about.
BROKEN: dict[str, tuple[str, Effect, Scope, tuple[str, ...]]] = {
    "redhat-no-mtp": ("G01", REFUSES, Scope.DRAFT, RELEASES),
    "partial-mtp": ("G01", REFUSES, Scope.DRAFT, RELEASES),
    "missing-experts": ("G05", REFUSES, Scope.TARGET, RELEASES),
    "no-scale-fmt": ("G07", REFUSES, Scope.TARGET, ("0.22.1",)),
    "global-scale-shape": ("G08", NOTES, Scope.TARGET, RELEASES),
    "scale-inv-name": ("G09", REFUSES, Scope.TARGET, RELEASES),
    "unfused-targets": ("G11", REFUSES, Scope.TARGET, ("0.22.1", "0.26.0")),
    "new-expert-targets": ("G11", REFUSES, Scope.TARGET, ("0.22.1", "0.26.0")),
    "old-expert-targets": ("G11", REFUSES, Scope.TARGET, ("0.33.0",)),
    "card-no-activations": ("G12", REFUSES, Scope.TARGET, RELEASES),
    "card-some-weights-only": ("G12", REFUSES, Scope.TARGET, RELEASES),
    "broad-ignore": ("G13", REFUSES, Scope.TARGET, RELEASES),
    "no-draft-ignore": ("G14", REFUSES, Scope.DRAFT, RELEASES),
    "no-aliases": ("draft-embedding", NOTES, Scope.DRAFT, RELEASES),
    "split-shared-experts": ("G17", REFUSES, Scope.TARGET, RELEASES),
    "literal-ignore": ("G18", DEPARTS, Scope.TARGET, RELEASES),
    "downcast": ("G19", LOSES, Scope.TARGET, RELEASES),
    "router-bias-name": ("G22", DEPARTS, Scope.TARGET, RELEASES),
    "actorder-static": ("G57", CORRUPTS, Scope.TARGET, RELEASES),
    "no-input-scales": ("G58", CORRUPTS, Scope.TARGET, RELEASES),
    "dspark": ("G69", REFUSES, Scope.DRAFT, RELEASES),
    "nvidia-modelopt": ("G16", CORRUPTS, Scope.DRAFT, ("0.22.1", "0.26.0")),
    "split-global-scales": ("w1/w3", CORRUPTS, Scope.TARGET, RELEASES),
}
# Made by the tools alone; see the tests of their own below.
ELSEWHERE = {"transformed-mtp", "fp8-compressor", "modelopt-fp8-mtp"}
# Findings of a sound artifact: what older releases need, and what is optional.
SOUND = {
    "bf16": {"draft-embedding", "bf16-wo_a"},
    "card": {"block-scale-name", "nvfp4-scales", "bf16-wo_a"},
    "w4a16-fp8-mtp": {"block-scale-name", "bf16-wo_a"},
    "native-fp8-mxfp4": {"draft-embedding"},
    "nvfp4a16-no-mtp": {"block-scale-name", "manifest"},  # somebody else's; no G58
}


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("layouts")
    return lambda variant: layout(folder, variant)


def _find(folder: Path) -> list[Finding]:
    profile = profile_of(folder)
    return find_all(profile, nearest(profile))


def _named(found: list[Finding], check: str) -> list[Finding]:
    return [finding for finding in found if finding.check == check_id(check)]


@pytest.mark.parametrize("variant", SOUND)
def test_a_sound_artifact_has_no_finding(variant: str, layouts: Callable[[str], Path]) -> None:
    found = _find(layouts(variant))
    assert {finding.check for finding in found} <= SOUND[variant]
    for release in RELEASES:
        told = [f for f in found if applies(f, release) and f.effect.breaks and not f.handled_by]
        assert told == []


@pytest.mark.parametrize("variant", BROKEN)
def test_a_broken_one_is_named(variant: str, layouts: Callable[[str], Path]) -> None:
    gate, effect, scope, releases = BROKEN[variant]
    found = [f for f in _named(_find(layouts(variant)), gate) if f.effect is effect]
    assert {f.scope for f in found} == {scope}
    assert {r for r in RELEASES if any(applies(f, r) for f in found)} == set(releases)
    sound = _find(layouts(load_variants()[variant].parent or variant))
    if variant not in SOUND and load_variants()[variant].parent:
        before = {(f.check, f.title) for f in sound}
        assert not {(f.check, f.title) for f in found} <= before


def test_every_variant_is_looked_at() -> None:
    assert {*BROKEN, *SOUND, *ELSEWHERE} == set(load_variants())
    assert set(MADE) <= {*BROKEN, *SOUND}


@pytest.mark.parametrize("variant", [*BROKEN, *SOUND])
def test_what_a_variant_says_of_itself_is_named(
    variant: str, layouts: Callable[[str], Path]
) -> None:
    """The gate in its row is among the findings."""
    numbers = [w.strip("(),;") for w in load_variants()[variant].breaks.split()]
    told = [n for n in numbers if n[:1] == "G" and n[1:].isdigit()]
    assert set(map(check_id, told)) <= {f.check for f in _find(layouts(variant))}


def _broken(base: Path, folder: Path, **change: Any) -> list[Finding]:
    apply_changes(Checkpoint.open(base), [Change.model_validate(change)], folder)
    return _find(folder)


def test_a_quantized_compressor_is_named(layouts: Callable[[str], Path], tmp_path: Path) -> None:
    """G23, with nothing but the dtype of one projection changed."""
    config = layout_config("card")
    rows = tmp_path / "rows"
    write_layout(rows, "flash-nvfp4-fp8-mtp", config)
    path = next(
        p
        for p in rows.glob("*.safetensors")
        if b"layers.1.attn.compressor.wkv" in p.read_bytes()[:200_000]
    )
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    row = header["layers.1.attn.compressor.wkv.weight"]
    row["dtype"] = "F8_E4M3"
    row["shape"] = [row["shape"][0], row["shape"][1] * 2]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    (found,) = _named(_find(rows), "G23")
    assert found.effect is REFUSES
    assert "layers.1.attn.compressor.wkv" in found.what
    assert not _named(_find(layouts("card")), "G23")


def test_dspark_says_how_many_tokens_to_draft(
    layouts: Callable[[str], Path], tmp_path: Path
) -> None:
    (found,) = _named(_find(layouts("dspark")), "other-drafter")
    assert "K = the checkpoint's block size, which config.json lacks" in found.remedy
    changed = _broken(layouts("dspark"), tmp_path / "block", set={"dspark_block_size": "5"})
    (found,) = _named(changed, "other-drafter")
    assert '"num_speculative_tokens": K' in found.remedy
    assert "K = 5: what is drafted beyond a block" in found.remedy


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (r"^layers\.(\d+)\.attn\.wq_a", r"model.layers.\1.self_attn.q_a_proj"),
        (r"^layers\.(\d+)\.ffn\.experts\.", r"model.layers.\1.mlp.switch_mlp."),
        (r"^embed\.", "model.embed_tokens."),
        (r"^head\.", "lm_head."),
        (r"^layers\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
        (r"^", "module."),
    ],
)
def test_names_of_other_libraries_are_called_so(
    ours: str, theirs: str, layouts: Callable[[str], Path], tmp_path: Path
) -> None:
    changed = _broken(layouts("card"), tmp_path / "names", rename=[ours, theirs])
    by = {finding.title: finding for finding in _named(changed, "names")}
    found = by["names of another library: transformers, MLX or a wrapper of torch"]
    assert (found.effect, "save_pretrained" in found.remedy) == (REFUSES, True)
    assert "tensors that the model does not have" not in by


class TestWeightsOnly:
    """G12: what loads with a patch, and what stops in the first forward pass nonetheless."""

    REPACKED = "wo_a is repacked for a kernel that the output projection does not use"

    def _repacked(self, found: list[Finding]) -> list[Finding]:
        return [f for f in _named(found, "G12") if f.title == self.REPACKED]

    def test_wo_a_in_such_a_group_stops_on_every_line(self, layouts: Callable[[str], Path]) -> None:
        (found,) = self._repacked(_find(layouts("card-no-activations")))
        assert (found.effect, found.scope, found.in_forward) == (REFUSES, Scope.TARGET, True)
        assert (found.handled_by, found.since, found.before) == ("", "", "")
        assert "fp8_einsum" in found.what
        assert "3 tensors: layers.0.attn.wo_a.weight and 2 like it" in found.what

    def test_the_others_do_not(self, layouts: Callable[[str], Path]) -> None:
        found = _find(layouts("card-some-weights-only"))
        assert not self._repacked(found)
        by = {f.title: f for f in _named(found, "G12")}
        loads = by["an FP8 block group without input_activations"]
        assert loads.handled_by == "vllm-project/vllm#43248"
        kernel = by["no kernel for FP8 blocks without activations"]
        assert [r for r in RELEASES if applies(kernel, r)] == ["0.22.1"]
        assert not _named(_find(layouts("card")), "G12")

    def test_groups_that_differ_are_not_their_last_one(
        self, layouts: Callable[[str], Path]
    ) -> None:
        """The artifact departs from its manifest, whichever group comes last."""
        (departs,) = _named(_find(layouts("card-some-weights-only")), "manifest")
        assert "fp8-block.inputs is [None, True], not True" in departs.what

    def test_an_ignored_wo_a_has_no_group(
        self, layouts: Callable[[str], Path], tmp_path: Path
    ) -> None:
        """What is wrong with it then is another gate's to say."""
        ignore = json.dumps([r"re:.*\.layers\.[013]\.attn\.wo_a$"])
        change = {"set": {"quantization_config.ignore": ignore}}
        (found,) = self._repacked(_broken(layouts("card-no-activations"), tmp_path / "x", **change))
        assert "1 tensor: layers.2.attn.wo_a.weight" in found.what

    @pytest.mark.parametrize(
        ("target", "stored", "told"),
        [
            (r"re:.*\.layers\.3\.attn\.wo_a$", Format.FP8_BLOCK, ["mtp.0"]),
            (r"re:.*\.layers\.3\.attn\.wo_b$", Format.FP8_BLOCK, []),
            (r"re:.*\.layers\.3\.attn\.wo_a$", Format.PLAIN, []),  # G14 says that
        ],
    )
    def test_a_draft_block_of_the_kind_loses_the_drafter(
        self, target: str, stored: Format, told: list[str], layouts: Callable[[str], Path]
    ) -> None:
        """FP8 blocks under mtp., and a config that means them."""
        checkpoint = profile_of(layouts("card-no-activations"))
        config = json.loads(json.dumps(checkpoint.config))
        config["quantization_config"]["ignore"] = []
        config["quantization_config"]["config_groups"]["group_0"]["targets"] = [target]
        profile = replace(checkpoint, config=config)
        profile.formats["mtp.0.attn.wo_a"] = stored
        found = self._repacked(list(activations(profile)))
        assert [f.scope for f in found] == [Scope.DRAFT] * len(told)
        assert all(f"1 tensor: {block}.attn.wo_a.weight" in found[0].what for block in told)


def test_a_quantized_drafter_that_the_config_does_not_tell(tmp_path: Path) -> None:
    """G16: native formats under mtp., while the config ignores the draft layer."""
    config = SMALL.config() | {"quantization_config": compressed(NVFP4_GROUP)}
    write_layout(tmp_path / "mixed", "deepseek-v4-flash", config)
    found = find_all(profile_of(tmp_path / "mixed"))
    assert {f.scope for f in _named(found, "G16")} == {Scope.DRAFT}


def test_vllm_0_33_reads_which_layers_are_left_in_mxfp4(
    layouts: Callable[[str], Path], tmp_path: Path
) -> None:
    """G16 on all lines without the config's ``ignore``; on none in the native layout."""
    change = {"set": {"quantization_config.ignore": "[]"}}
    found = _named(_broken(layouts("nvidia-modelopt"), tmp_path / "silent", **change), "G16")
    assert [r for r in RELEASES if any(applies(f, r) for f in found)] == list(RELEASES)
    assert not _named(_find(layouts("native-fp8-mxfp4")), "G16")


class TestConfig:
    """Rules that mean nothing, everything, or nonsense."""

    def _with(
        self, layouts: Callable[[str], Path], folder: Path, **quantization: Any
    ) -> list[Finding]:
        shutil.copytree(layouts("card"), folder, copy_function=shutil.copyfile)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= quantization
        (folder / "config.json").write_text(json.dumps(config))
        return find_all(profile_of(folder))

    def _groups(self, *targets: str) -> dict[str, Any]:
        groups = compressed(NVFP4_GROUP)["config_groups"]
        return {
            "group_0": {**groups["group_0"], "targets": list(targets)},
            "group_1": groups["group_1"],
        }

    def test_a_target_that_means_no_module(
        self, layouts: Callable[[str], Path], tmp_path: Path
    ) -> None:
        groups = self._groups(r"re:.*\.self_attn\.q_proj$")
        found = _named(self._with(layouts, tmp_path / "x", config_groups=groups), "G11")
        assert "targets that match no module" in {f.title for f in found}
        assert "quantized weights that no target matches" in {f.title for f in found}

    @pytest.mark.parametrize("target", ["Linear", "re:.*"])
    def test_a_target_that_means_every_module(
        self, layouts: Callable[[str], Path], tmp_path: Path, target: str
    ) -> None:
        groups = self._groups(target)
        found = self._with(layouts, tmp_path / "x", config_groups=groups, ignore=[])
        titles = {f.title for f in _named(found, "G11")}
        assert "weights that would be quantized are not" in titles
        if target == "Linear":  # is right where the rest is ignored
            assert _named(self._with(layouts, tmp_path / "y", config_groups=groups), "G11") == []

    def test_invalid_target_pattern(self, layouts: Callable[[str], Path], tmp_path: Path) -> None:
        groups = self._groups("re:.*(")
        found = _named(self._with(layouts, tmp_path / "x", config_groups=groups), "G11")
        assert [f.title for f in found] == ["a rule is not a regular expression"]

    def test_a_group_of_other_arguments(
        self, layouts: Callable[[str], Path], tmp_path: Path
    ) -> None:
        groups = self._groups(*compressed(NVFP4_GROUP)["config_groups"]["group_0"]["targets"])
        groups["group_0"] |= {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
        found = _named(self._with(layouts, tmp_path / "x", config_groups=groups), "G11")
        assert "the group's arguments do not fit how the weights are stored" in {
            f.title for f in found
        }

    def test_the_layer_of_a_longer_number_is_not_hidden(
        self, layouts: Callable[[str], Path], tmp_path: Path
    ) -> None:
        ignore = [*compressed(NVFP4_GROUP)["ignore"], r"re:.*layers\.1"]
        found = _named(self._with(layouts, tmp_path / "x", ignore=ignore), "G13")
        assert {f.effect for f in found} == {REFUSES}
        assert all("layers.1." in f.what and "layers.0" not in f.what for f in found)


class TestScalars:
    def _set(self, folder: Path, name: str, value: float) -> None:
        entry = profile_of(folder).tensors[name]
        path = folder / entry.shard
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.seek(entry.begin)
            file.write(struct.pack("<f", value))

    @pytest.fixture
    def card(self, layouts: Callable[[str], Path], tmp_path: Path) -> Path:
        shutil.copytree(layouts("card"), tmp_path / "card", copy_function=shutil.copyfile)
        return tmp_path / "card"

    @pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
    def test_no_positive_number(self, card: Path, value: float) -> None:
        self._set(card, "layers.1.ffn.experts.3.w2.input_global_scale", value)
        found = _named(find_all(profile_of(card)), "scales")
        assert [f.effect for f in found] == [CORRUPTS]
        assert "layers.1.ffn.experts.3.w2" in found[0].what

    def test_one_expert_that_differs(self, card: Path) -> None:
        self._set(card, "layers.2.ffn.experts.7.w3.weight_global_scale", 1.25)
        (found,) = _named(find_all(profile_of(card)), "w1/w3")
        assert "1 of 24 experts, e.g. layers.2.ffn.experts.7" in found.what
        assert "x 1.25" in found.what

    def test_w2_has_one_of_its_own(self, card: Path) -> None:
        self._set(card, "layers.2.ffn.experts.7.w2.weight_global_scale", 1.25)
        assert not _named(find_all(profile_of(card)), "w1/w3")


class TestFiles:
    @pytest.fixture
    def card(self, layouts: Callable[[str], Path], tmp_path: Path) -> Path:
        shutil.copytree(layouts("card"), tmp_path / "card", copy_function=shutil.copyfile)
        return tmp_path / "card"

    def _index(self, card: Path) -> dict[str, Any]:
        index: dict[str, Any] = json.loads((card / "model.safetensors.index.json").read_text())
        return index

    def _write(self, card: Path, index: dict[str, Any]) -> list[Finding]:
        (card / "model.safetensors.index.json").write_text(json.dumps(index))
        return _named(find_all(profile_of(card)), "files")

    def test_a_missing_shard(self, card: Path) -> None:
        (card / "model-00002-of-00002.safetensors").unlink()
        found = _named(find_all(profile_of(card)), "files")
        assert [f.effect for f in found] == [REFUSES]
        assert "1 of 2 shards" in found[0].what

    def test_an_index_that_lists_one_too_many(self, card: Path) -> None:
        index = self._index(card)
        index["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
        (found,) = self._write(card, index)
        assert (found.effect, "ghost.weight" in found.what) == (DEPARTS, True)

    def test_an_index_that_points_to_the_other_shard(self, card: Path) -> None:
        index = self._index(card)
        name, shard = next(iter(index["weight_map"].items()))
        index["weight_map"][name] = (
            shard.replace("00001-of", "0000X-of")
            .replace("00002-of", "00001-of")
            .replace("0000X-of", "00002-of")
        )
        (found,) = self._write(card, index)
        assert name in found.what

    def test_a_wrong_sum(self, card: Path) -> None:
        index = self._index(card)
        index["metadata"]["total_size"] += 1
        (found,) = self._write(card, index)
        assert found.effect is NOTES


class TestProfile:
    @pytest.mark.parametrize(
        "key", [key for key, f in Config.model_fields.items() if f.is_required() and key != DRAFTS]
    )
    def test_a_config_without_a_number_is_refused(
        self, key: str, layouts: Callable[[str], Path]
    ) -> None:
        checkpoint = profile_of(layouts("card"))
        config = {name: value for name, value in checkpoint.config.items() if name != key}
        with pytest.raises(CheckpointUnreadableError, match=key):
            replace(checkpoint, config=config)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"model_type": "deepseek_v3"}, "'deepseek_v3', not 'deepseek_v4'"),
            ({"compress_ratios": [0]}, "1 entries for 3 layers"),
        ],
    )
    def test_another_model_is_refused(
        self, change: dict[str, Any], words: str, layouts: Callable[[str], Path]
    ) -> None:
        checkpoint = profile_of(layouts("card"))
        with pytest.raises(CheckpointUnreadableError, match=words):
            replace(checkpoint, config={**checkpoint.config, **change})


def test_alike_names_are_reported_once() -> None:
    names = [f"layers.{n}.ffn.gate.bias" for n in range(40)] + ["mtp.0.ffn.gate.bias"]
    assert (
        summarize(names) == "41 tensors: layers.0.ffn.gate.bias and 39 like it, mtp.0.ffn.gate.bias"
    )
    assert summarize(["a"]) == "1 tensor: a"
