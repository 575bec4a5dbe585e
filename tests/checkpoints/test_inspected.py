"""What the quantizer made: the inspector finds nothing, and every weight is within its bound."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.support.variants import load_variants
from tests.support.verdicts import VERDICTS
from vllm_forge.checkpoints.checkpoint import CheckpointSource, Folder
from vllm_forge.checkpoints.inspect.findings import Effect
from vllm_forge.checkpoints.inspect.inspection import find_all, inspect
from vllm_forge.checkpoints.inspect.manifest import nearest
from vllm_forge.checkpoints.inspect.profile import Format, Part, Profile
from vllm_forge.checkpoints.inspect.values import compare
from vllm_forge.matrix import load
from vllm_forge.patches import read_dispositions

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _profile(folder: Path) -> Profile:
    return Profile.open(Folder(folder))


def test_the_card_is_what_its_manifest_says(card: Path) -> None:
    profile = _profile(card)
    assert nearest(profile) == "flash-nvfp4-fp8-mtp"
    found = find_all(profile, "flash-nvfp4-fp8-mtp", source=None)
    assert [f.title for f in found if not f.handled_by] == []


@pytest.mark.parametrize("name", load_variants())
def test_rules_alone_leave_with_the_code_that_vllm_gives(
    name: str, variant: Callable[[str], Path], root: Path
) -> None:
    """Where no line's vLLM can be asked, the default line's verdict is the same."""
    asked = json.loads((root / VERDICTS).read_text())
    row = asked["variants"][name]
    report = inspect(
        _profile(variant(name)), asked["vllm"], read_dispositions(root / "patches/vllm"), {}
    )
    error = report.error(load(root).default_line)
    assert (error and type(error).__name__) == row["error"]
    outcomes = {line.line: line.outcome for line in report.lines}
    for line, recorded in row["lines"].items():
        if (name, line) not in RULES_DO_NOT_KNOW:
            assert outcomes[line] == recorded["outcome"]


# Which drafters a line has is for its vLLM to say.
RULES_DO_NOT_KNOW = {("dspark", "0.26"), ("dspark", "0.33")}

NVFP4, INT4, MXFP4 = Format.NVFP4, Format.W4A16, Format.MXFP4_NATIVE
MODELOPT, BLOCK, NATIVE = Format.MODELOPT_NVFP4, Format.FP8_BLOCK, Format.FP8_NATIVE
# Variant -> formats of its decoder's experts, its draft's experts and its attention.
FORMATS = {
    "card": (NVFP4, Format.PLAIN, BLOCK),
    "w4a16-fp8-mtp": (INT4, Format.PLAIN, BLOCK),
    "native-fp8-mxfp4": (MXFP4, MXFP4, NATIVE),
    "nvidia-modelopt": (MODELOPT, MXFP4, NATIVE),
    "modelopt-fp8-mtp": (MODELOPT, NATIVE, NATIVE),
}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_the_models_within_derived_bounds(
    name: str, variant: Callable[[str], Path]
) -> None:
    """Bounds from the BF16 weights alone; what is not quantized is the same byte for byte."""
    rows, found = compare(_profile(variant(name)), _profile(variant("bf16")))
    assert found == []
    told = {(row.part, row.draft): row for row in rows}
    experts, drafts, attention = FORMATS[name]
    assert told[Part.EXPERTS, False].format is experts
    assert told[Part.EXPERTS, True].format is drafts
    assert told[Part.ATTENTION, False].format is attention
    assert told[Part.EXPERTS, False].weights == 3 * 8 * 3
    for row in rows:
        if row.format is not Format.PLAIN:
            assert row.worst is not None
            assert 0.8 < row.worst <= 1, row  # a bound that is far away would tell nothing


@dataclass(frozen=True)
class Changed(CheckpointSource):
    """A folder with other bytes in one place."""

    folder: Folder
    shard: str
    begin: int
    data: bytes

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def sizes(self) -> Mapping[str, int]:  # type: ignore[override]
        return self.folder.sizes

    def read(self, name: str, begin: int, end: int) -> bytearray:
        data = self.folder.read(name, begin, end)
        low, high = max(begin, self.begin), min(end, self.begin + len(self.data))
        if name == self.shard and low < high:
            data[low - begin : high - begin] = self.data[low - self.begin : high - self.begin]
        return data


def _bytes(change: Callable[[NDArray[Any]], NDArray[Any]], dtype: str = "u1") -> Fault:
    return lambda data: change(np.frombuffer(data, dtype)).tobytes()


Fault = Callable[[bytes], bytes]
SWAPPED = _bytes(lambda b: (b << np.uint8(4)) | (b >> np.uint8(4)))
INVERSE = _bytes(lambda x: (np.float32(1) / x).astype("<f4"), "<f4")
ROLLED = _bytes(lambda b: np.roll(b, 1))
ONES = _bytes(lambda b: np.full_like(b, 0x38))
TWICE = _bytes(lambda b: b + np.uint16(1 << 7), "<u2")  # one more in BF16's exponent
UP, DOWN = _bytes(lambda b: b + np.uint8(1)), _bytes(lambda b: b - np.uint8(1))
EXPERT = "layers.1.ffn.experts.3"
FAULTS: dict[str, tuple[str, str, Fault]] = {
    "nvfp4: nibbles swapped": ("card", f"{EXPERT}.w2.weight_packed", SWAPPED),
    "nvfp4: inverted global scale": ("card", f"{EXPERT}.w2.weight_global_scale", INVERSE),
    "nvfp4: dropped block scales": ("card", f"{EXPERT}.w1.weight_scale", ONES),
    "fp8: rolled codes": ("card", "layers.2.attn.wq_b.weight", ROLLED),
    "fp8: inverted scales": ("card", "layers.2.attn.wq_b.weight_scale", INVERSE),
    "int4: nibbles swapped": ("w4a16-fp8-mtp", f"{EXPERT}.w3.weight_packed", SWAPPED),
    "int4: words moved": ("w4a16-fp8-mtp", f"{EXPERT}.w3.weight_packed", ROLLED),
    "int4: scales twice as large": ("w4a16-fp8-mtp", f"{EXPERT}.w3.weight_scale", TWICE),
    "mxfp4: nibbles swapped": ("native-fp8-mxfp4", f"{EXPERT}.w2.weight", SWAPPED),
    "mxfp4: scales twice as large": ("native-fp8-mxfp4", f"{EXPERT}.w2.scale", UP),
    "mxfp4: scales half as large": ("native-fp8-mxfp4", "mtp.0.ffn.experts.7.w1.scale", DOWN),
    "native fp8: rolled codes": ("native-fp8-mxfp4", "layers.0.attn.wo_b.weight", ROLLED),
    "native fp8: scales of double": ("native-fp8-mxfp4", "mtp.0.e_proj.scale", UP),
    "modelopt: inverted scale": ("nvidia-modelopt", f"{EXPERT}.w2.weight_scale_2", INVERSE),
    "modelopt: nibbles swapped": ("nvidia-modelopt", f"{EXPERT}.w1.weight", SWAPPED),
    "modelopt: draft's scales": ("nvidia-modelopt", "mtp.0.ffn.experts.3.w1.scale", UP),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_beyond_its_bound(fault: str, variant: Callable[[str], Path]) -> None:
    name, tensor, change = FAULTS[fault]
    folder = Folder(variant(name))
    entry = Profile.open(folder).tensors[tensor]
    data = change(bytes(folder.read(entry.shard, entry.begin, entry.end)))
    made = Profile.open(Changed(folder, entry.shard, entry.begin, data))
    rows, found = compare(made, _profile(variant("bf16")))
    assert [finding.effect for finding in found] == [Effect.CORRUPTS]
    different = [module for row in rows for module in row.different]
    assert different == [tensor.rpartition(".")[0]]


def test_the_scale_of_w1_is_that_of_w3_too(variant: Callable[[str], Path]) -> None:
    """One scale for two: w1's own is halved, and both projections are beyond their bounds."""
    for name, leaf in (("card", "weight_global_scale"), ("nvidia-modelopt", "weight_scale_2")):
        folder = Folder(variant(name))
        entry = Profile.open(folder).tensors[f"{EXPERT}.w1.{leaf}"]
        data = _bytes(lambda x: x / 2, "<f4")(
            bytes(folder.read(entry.shard, entry.begin, entry.end))
        )
        made = Profile.open(Changed(folder, entry.shard, entry.begin, data))
        rows, _ = compare(made, _profile(variant("bf16")))
        different = {module for row in rows for module in row.different}
        assert different == {f"{EXPERT}.w1", f"{EXPERT}.w3"}


def test_the_spread_of_scales_does_not_tell_gptq(variant: Callable[[str], Path]) -> None:
    """A plan of the field calls a checkpoint GPTQ where each expert's scales vary by over 5 %.

    Rounding to nearest gives such scales as well: they are the groups' maxima. So this is no check.
    """
    profile = _profile(variant("w4a16-fp8-mtp"))
    names = [n for n in profile.tensors if n.endswith(".weight_scale") and ".experts." in n]
    assert len(names) == 72
    for name in names:
        entry = profile.tensors[name]
        data = profile.source.read(entry.shard, entry.begin, entry.end)
        scales = (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        assert scales.std() / scales.mean() > 0.05
