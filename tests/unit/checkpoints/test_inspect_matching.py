"""Which modules a rule means, as vLLM of different ages asks; what a manifest wants; drafters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from packaging.version import Version

from tests.support.layouts import layout, layout_config, profile_of
from vllm_forge.checkpoints.architecture import Group, Rules
from vllm_forge.checkpoints.inspect.inspection import find_all
from vllm_forge.checkpoints.inspect.manifest import departures, named, nearest
from vllm_forge.checkpoints.inspect.matching import probes, resolve
from vllm_forge.checkpoints.inspect.profile import Drafter, Format, drafter_of, recognize, split

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.checkpoints.inspect.findings import Finding

WQ_A, FUSED = "model.layers.3.attn.wq_a", "model.layers.3.attn.fused_wqa_wkv"
OLD, NEW = Version("0.26.0"), Version("0.33.0")


@pytest.mark.parametrize(
    ("rule", "name", "expected"),
    [
        (r"re:.*\.wq_a$", WQ_A, True),
        (r"re:wq_a$", WQ_A, False),  # from the start of the name
        (r"re:model\.layers\.3", WQ_A, True),  # to anywhere in it
        (r"re:.*layers\.3\..*", "model.layers.31.attn.wq_a", False),
        (r"re:.*layers\.3.*", "model.layers.31.attn.wq_a", True),
        (WQ_A, WQ_A, True),
        ("wq_a", WQ_A, False),
        ("Linear", WQ_A, False),  # a class, see matching.resolve
    ],
)
def test_a_rule_is_a_name_or_a_pattern(rule: str, name: str, expected: bool) -> None:
    assert Rules([rule]).match(name) is expected


def test_nonsense_is_reported() -> None:
    rules = Rules(["(", "re:x", "re:("])
    assert rules.malformed == ["re:("]
    assert rules.literal == {"("}


@pytest.mark.parametrize(
    ("rules", "version", "expected"),
    [
        ([r"re:.*\.(wq_a|wkv)$"], NEW, True),
        ([r"re:.*\.(wq_a|wkv)$"], OLD, False),
        ([r"re:.*\.wq_a$"], NEW, False),  # all parts, or none
        ([r"re:.*\.wq_a$", r"re:.*\.wkv$"], NEW, True),
        ([r"re:.*\.fused_wqa_wkv$"], OLD, True),
    ],
)
def test_the_parts_mean_the_whole_since_the_model_says_so(
    rules: list[str], version: Version, expected: bool
) -> None:
    assert Rules(rules).means(FUSED, version) is expected


def test_a_name_comes_before_a_class_and_an_ignore_list_means_no_class() -> None:
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 8}}
    by_class, by_name = (
        Group.model_validate({**scheme, "targets": targets})
        for targets in (["Linear"], [r"re:.*\.wq_a$"])
    )
    groups, none = {"first": by_class, "second": by_name}, Rules([])
    assert resolve(groups, none, WQ_A, OLD) is by_name
    assert resolve(groups, none, FUSED, OLD) is by_class
    assert resolve(groups, Rules(["Linear"]), FUSED, OLD) is by_class
    assert resolve(groups, Rules([FUSED]), FUSED, OLD) is None


def test_experts_are_asked_for_by_other_names_since_0_32() -> None:
    assert probes(Version("0.31.9")) == ("gate_proj", "up_proj", "down_proj")
    assert probes(Version("0.32.0")) == ("w1", "w3", "w2")


@pytest.mark.parametrize(
    ("names", "drafter"),
    [
        ([], Drafter.NONE),
        (["layers.0.attn.wq_a.weight"], Drafter.NONE),
        (["mtp.0.enorm.weight"], Drafter.MTP),
        (["mtp.0.e_proj.weight_packed"], Drafter.MTP),
        (["mtp.2.markov_head.markov_w1.weight"], Drafter.DSPARK),
        (["mtp.0.ffn.gate.weight"], Drafter.UNKNOWN),
    ],
)
def test_drafter_is_recognized_by_its_own_tensors(names: list[str], drafter: Drafter) -> None:
    assert drafter_of(names) is drafter


def test_a_dspark_layout_is_one(tmp_path: Path) -> None:
    profile = profile_of(layout(tmp_path, "dspark"))
    assert profile.drafter is Drafter.DSPARK
    assert nearest(profile) == "deepseek-v4-flash-0731"


@pytest.mark.parametrize(
    ("dtypes", "kind"),
    [
        ({"weight": "BF16"}, Format.PLAIN),
        ({"weight": "F8_E4M3", "weight_scale": "F32"}, Format.FP8_BLOCK),
        ({"weight": "F8_E4M3", "weight_scale_inv": "F32"}, Format.FP8_BLOCK),
        ({"weight": "F8_E4M3"}, Format.FP8_BLOCK),  # and its scale is missing
        ({"weight": "F8_E4M3", "scale": "F8_E8M0"}, Format.FP8_NATIVE),
        ({"weight": "I8", "scale": "F8_E8M0"}, Format.MXFP4_NATIVE),
        ({"weight": "U8", "weight_scale_2": "F32"}, Format.MODELOPT_NVFP4),
        ({"weight_packed": "U8"}, Format.NVFP4),
        ({"weight_packed": "I32"}, Format.W4A16),
        ({"weight": "BF16", "weight_scale": "F32"}, Format.UNKNOWN),
        ({"weight_scale": "F32"}, Format.UNKNOWN),
        ({"weight": "F64"}, Format.UNKNOWN),
    ],
)
def test_format_is_recognized_by_what_is_read(dtypes: dict[str, str], kind: Format) -> None:
    assert recognize(dtypes) is kind


def test_a_name_is_split_at_its_suffix() -> None:
    assert split("a.b.weight_scale") == ("a.b", "weight_scale")
    assert split("a.attn_sink") == ("a.attn_sink", "")


class TestManifest:
    def _departs(self, folder: Path, artifact: str) -> list[Finding]:
        return list(departures(profile_of(folder), artifact))

    @pytest.mark.parametrize("variant", ["card", "w4a16-fp8-mtp", "native-fp8-mxfp4", "bf16"])
    def test_an_artifact_is_itself_and_no_other(self, variant: str, tmp_path: Path) -> None:
        folder = layout(tmp_path, variant)
        own = nearest(profile_of(folder))
        assert own is not None
        assert self._departs(folder, own) == []
        for other in {"flash-nvfp4-fp8-mtp", "flash-w4a16-fp8-mtp", "bf16"} - {own}:
            assert self._departs(folder, other)

    def test_input_scales_are_wanted_where_activations_are_quantized(self, tmp_path: Path) -> None:
        found = self._departs(layout(tmp_path, "no-input-scales"), "flash-nvfp4-fp8-mtp")
        assert ["input_global_scale" in f.what for f in found] == [True]
        config = layout_config("card")
        wanted = {w.name: w.optional for w in named("flash-nvfp4-fp8-mtp").wanted(config)}
        assert wanted["layers.0.ffn.experts.0.w1.input_global_scale"] is False

    def test_something_else_is_like_none(self, tmp_path: Path) -> None:
        profile = profile_of(layout(tmp_path, "card"))
        foreign = {f"vision.part{n}": "x" for n in range(len(profile.modules))}
        assert nearest(replace(profile, names={**profile.names, **foreign})) is None


class TestRecord:
    """manifest.json, as `quantize` leaves it."""

    @pytest.fixture
    def card(self, tmp_path: Path) -> Path:
        shutil.copytree(layout(tmp_path, "card"), tmp_path / "copy", copy_function=shutil.copyfile)
        return tmp_path / "copy"

    def _rows(self, folder: Path) -> dict[str, Any]:
        return {
            name: {"file": e.shard, "dtype": e.dtype, "shape": list(e.shape), "sha256": ""}
            for name, e in profile_of(folder).tensors.items()
        }

    def _titles(self, folder: Path, content: Any) -> set[str]:
        (folder / "manifest.json").write_text(json.dumps(content))
        return {f.title for f in find_all(profile_of(folder)) if f.check == "record"}

    def test_no_finding_for_equal_values(self, card: Path) -> None:
        assert self._titles(card, {"tensors": self._rows(card)}) == set()

    @pytest.mark.parametrize(
        ("change", "value", "title"),
        [
            ("dtype", "F16", "dtype, shape or shard is not as recorded in manifest.json"),
            ("shape", [1], "dtype, shape or shard is not as recorded in manifest.json"),
            ("file", "other", "dtype, shape or shard is not as recorded in manifest.json"),
        ],
    )
    def test_a_change_is_reported(self, card: Path, change: str, value: Any, title: str) -> None:
        rows = self._rows(card)
        rows["norm.weight"][change] = value
        assert self._titles(card, {"tensors": rows}) == {title}

    def test_one_too_few_and_one_too_many_are_reported(self, card: Path) -> None:
        rows = self._rows(card)
        rows["ghost.weight"] = rows.pop("norm.weight")
        assert self._titles(card, {"tensors": rows}) == {
            "recorded tensors are missing in manifest.json",
            "tensors are not recorded in manifest.json",
        }

    @pytest.mark.parametrize("content", [[], {}, {"tensors": []}, {"tensors": {"a": {}}}])
    def test_another_file_of_that_name_is_reported(self, card: Path, content: Any) -> None:
        assert self._titles(card, content) == {"manifest.json cannot be read"}
