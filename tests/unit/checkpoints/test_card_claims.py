"""The model card's claims: the page has what is computed now, and counts are the family's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vllm_forge.checkpoints.inspect.claims import (
    PLACEHOLDER,
    claims_table,
    fill,
    put_into,
    read_claims,
)
from vllm_forge.checkpoints.inspect.formats import Format
from vllm_forge.checkpoints.inspect.manifest import named
from vllm_forge.checkpoints.measured import PAGE
from vllm_forge.errors import UsageError
from vllm_forge.kernels.selection.artifacts import artifact_config

ROOT = Path(__file__).parents[3]


def test_the_page_has_what_is_computed_now() -> None:
    page = (ROOT / PAGE).read_text()
    assert page == put_into(page, ROOT), "run: nox -s verdicts"


def test_nothing_is_typed_in_that_can_be_computed() -> None:
    """Sizes and counts of a `found` come from braces; what is left are names and versions."""
    allowed = {"0.22", "0.26", "0.33", "172"}
    for claim in read_claims().claim:
        left = PLACEHOLDER.sub("", claim.found)
        words = {word.strip(".,;:()") for word in left.split()} - allowed
        assert not [w for w in words if w.replace(",", "").replace(".", "").isdecimal()], claim


def test_a_name_that_is_not_known_is_told() -> None:
    assert fill("{a} of {b:0.22}", {"a": 1, "b:0.22": "x"}) == "1 of x"
    with pytest.raises(UsageError, match="'c'"):
        fill("{c}", {})


def test_a_page_without_a_place_is_told() -> None:
    with pytest.raises(UsageError, match="claims"):
        put_into("no marks here", ROOT)


def test_contradicted_ones_come_first() -> None:
    rows = [line.rpartition("| ")[2].strip(" |") for line in claims_table(ROOT).splitlines()[2:]]
    assert rows == sorted(rows, key=["contradicted", "half", "holds"].index)
    assert {"contradicted", "half", "holds"} == set(rows)


# The field's own checks of such an artifact (verify_option_y.py and others of the family): the
# threshold, and how it is counted over names and formats.
THRESHOLDS = {
    "packed expert weights": 43 * 256 * 3,
    "block scales of attention": 43 * 5,
    "global scales": 2 * 43 * 256 * 3,
    "mtp": 797 + 2,
    "quantized mtp": 0,
    "mtp expert weights": 256 * 3,
    "experts of a layer": 256,
    "embedding and head": 2,
}


def test_the_fields_thresholds_are_the_manifests() -> None:
    """Exact here, where scripts ask for "at least one", "about" or 30,000."""
    of = read_claims().of
    config = artifact_config(of.model)
    names = [want.name for want in named(of.card).wanted(config)]
    found = {
        "packed expert weights": sum(n.endswith(".weight_packed") for n in names),
        "block scales of attention": sum(".attn." in n and n.endswith("_scale") for n in names),
        "global scales": sum(n.endswith("_global_scale") for n in names),
        "mtp": sum(n.startswith("mtp.") for n in names),
        "quantized mtp": sum(
            n.startswith("mtp.") and n.endswith(("scale", "packed", "zero_point", "_inv"))
            and "hc_" not in n for n in names
        ),
        "mtp expert weights": sum(n.startswith("mtp.") and ".experts." in n for n in names),
        "experts of a layer": len(
            {n.split(".")[4] for n in names if n.startswith("layers.7.ffn.experts.")}
        ),
        "embedding and head": sum(n in {"embed.weight", "head.weight"} for n in names),
    }  # fmt: skip
    assert found == THRESHOLDS
    assert len(config["compress_ratios"]) == 43 + 1
    kinds = Counter(f for rule in named(of.card).rules for f in rule.formats)
    assert kinds == {Format.NVFP4: 1, Format.FP8_BLOCK: 1}
