"""The manifests' rules give the counts that others state of the artifacts as published."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from vllm_forge.checkpoints.architecture import main_tensors
from vllm_forge.checkpoints.inspect.manifest import manifests, named
from vllm_forge.checkpoints.inspect.profile import (
    Drafter,
    Format,
    Part,
    draft_tensors,
    part_of,
)
from vllm_forge.checkpoints.tensors import DTYPE_BYTES
from vllm_forge.errors import UsageError
from vllm_forge.kernels.selection.questions import artifact_config

ARTIFACTS = Path(__file__).parents[3] / "src/vllm_forge/kernels/selection/artifacts"
FLASH: dict[str, Any] = json.loads((ARTIFACTS / "deepseek-v4-flash.json").read_text())["config"]
DSPARK = artifact_config("deepseek-v4-flash-0731")


@cache
def _names(artifact: str) -> Counter[str]:
    config = artifact_config(artifact) if (ARTIFACTS / f"{artifact}.json").exists() else FLASH
    return Counter(want.name for want in named(artifact).wanted(config))


@pytest.mark.parametrize("artifact", manifests())
def test_counts_are_the_published_ones(artifact: str) -> None:
    names = _names(artifact)
    assert set(names.values()) == {1}
    published = named(artifact).published
    found = {
        "mtp": sum(name.startswith("mtp.") for name in names),
        "tensors": len(names),
        "global_scales": sum(name.endswith("_global_scale") for name in names),
        "packed_experts": sum(name.endswith(".weight_packed") for name in names),
        "weight_scales": sum(name.endswith(".weight_scale") for name in names),
    }
    assert published or artifact == "redhat-nvfp4-fp8"
    assert {key: found[key] for key in published.keys() & found.keys()} == {
        key: published[key] for key in published.keys() & found.keys()
    }


# The field's own checks of such an artifact (verify_option_y.py and others of the family): the
# threshold, and how it is counted over names.
THRESHOLDS: dict[str, tuple[int, Callable[[str], bool]]] = {
    "packed expert weights": (43 * 256 * 3, lambda n: n.endswith(".weight_packed")),
    "block scales of attention": (43 * 5, lambda n: ".attn." in n and n.endswith("_scale")),
    "global scales": (2 * 43 * 256 * 3, lambda n: n.endswith("_global_scale")),
    "mtp": (797 + 2, lambda n: n.startswith("mtp.")),
    "quantized mtp": (
        0,
        lambda n: n.startswith("mtp.")
        and n.endswith(("scale", "packed", "zero_point", "_inv"))
        and "hc_" not in n,
    ),
    "mtp expert weights": (256 * 3, lambda n: n.startswith("mtp.") and ".experts." in n),
    "experts of a layer": (
        256, lambda n: n.startswith("layers.7.ffn.experts.") and n.endswith(".w1.weight_packed"),
    ),
    "embedding and head": (2, lambda n: n in {"embed.weight", "head.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_of_the_field_are_exact(name: str) -> None:
    """Scripts of the field ask for "at least one", "about" or 30,000."""
    count, counts = THRESHOLDS[name]
    assert sum(map(counts, _names("flash-nvfp4-fp8-mtp"))) == count


def test_the_card_has_two_quantized_formats() -> None:
    formats = Counter(f for rule in named("flash-nvfp4-fp8-mtp").rules for f in rule.formats)
    assert formats == {Format.NVFP4: 1, Format.FP8_BLOCK: 1}


def test_dspark_blocks_have_the_counted_tensors() -> None:
    blocks = Counter(n.split(".")[1] for n in _names("deepseek-v4-flash-0731") if n[:4] == "mtp.")
    assert blocks == {"0": 1568, "1": 1565, "2": 1572}


def test_what_was_rounded_and_what_was_missed() -> None:
    """417 FP32 tensors; a fix that went by other names missed 103 of them."""
    wide = [
        t for t in (*main_tensors(FLASH), *draft_tensors(FLASH, Drafter.MTP)) if t.dtype == "F32"
    ]
    assert len(wide) == 417
    renamed = [t for t in wide if t.name.endswith((".ape", "gate.bias"))]
    assert len(renamed) == 103


def test_what_was_fp8_by_mistake() -> None:
    parts = {Part.COMPRESSOR, Part.INDEXER}
    matrices = [
        t for t in main_tensors(FLASH) if part_of(t.name) in parts and t.name[-7:] == ".weight"
    ]
    assert sum(len(t.shape) == 2 for t in matrices) == 166


def test_the_w4a16_artifact_has_166_names_more_than_its_rules_without_aliases() -> None:
    assert 101_449 - (len(_names("flash-w4a16-fp8-mtp")) - 2) == 166


def test_the_cards_artifact_is_larger_than_the_card_says() -> None:
    wanted = named("flash-nvfp4-fp8-mtp").wanted(FLASH)
    size = sum(math.prod(w.shape) * DTYPE_BYTES[w.dtypes[0]] for w in wanted)
    assert round(size / 1e9, 1) == 181.3
    assert round(size / 2**30, 1) == 168.8
    assert named("flash-nvfp4-fp8-mtp").published["gigabytes"] == 172


def test_every_tensor_has_a_part() -> None:
    for config, drafter in ((FLASH, Drafter.MTP), (DSPARK, Drafter.DSPARK)):
        for tensor in (*main_tensors(config), *draft_tensors(config, drafter)):
            assert part_of(tensor.name) is not Part.OTHER, tensor.name
    assert part_of("vision.patch_embed.weight") is Part.OTHER


def test_rules_name_no_format_that_is_not_stored() -> None:
    for name, manifest in manifests().items():
        for rule in manifest.rules:
            assert Format.UNKNOWN not in rule.formats, name


def test_a_mistyped_manifest_is_reported() -> None:
    with pytest.raises(UsageError, match="did you mean 'nvidia-nvfp4'"):
        named("nvidia-nvpf4")
