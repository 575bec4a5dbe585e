"""Layouts that others write: what vLLM takes is no fault, and what it does not take is one.

Outcomes by rules. They are those of dry loads by all three lines' vLLM, but for the rows that one
cannot have: values of scales, and another architecture, which was not loaded.
"""

from __future__ import annotations

import json
import math
import struct
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.layouts import ATTENTION, ONES, layout
from tests.support.memory import inspect_files
from vllm_forge.checkpoints.checkpoint import MAX_TEXT, Checkpoint, Folder, find_source
from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.tensors import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_forge.checkpoints.inspect.inspection import Report

Rows = dict[str, tuple[str, tuple[int, ...]]]
MTP, WITHOUT, NOT = "serves with MTP", "serves without MTP", "does not serve"


class Case:
    """Tensors and config of a checkpoint, to be changed."""

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        self.rows: Rows = {t.name: (t.dtype, t.shape) for t in checkpoint.tensors.values()}
        self.config: dict[str, Any] = checkpoint.config
        self.beside: dict[str, Any] = {}
        self.ones = dict(ONES)

    def rename(self, old: str, new: str) -> None:
        """All names that begin so."""
        self.rows = {
            new + name.removeprefix(old) if name.startswith(old) else name: row
            for name, row in self.rows.items()
        }

    def drop(self, start: str) -> None:
        self.rows = {name: row for name, row in self.rows.items() if not name.startswith(start)}

    def dtype(self, ending: str, dtype: str) -> None:
        """Another one for all names that end so."""
        for name, (_, shape) in self.rows.items():
            if name.endswith(ending):
                self.rows[name] = (dtype, shape)

    def report(self) -> Report:
        header, data = {}, b""
        for name, (dtype, shape) in sorted(
            self.rows.items(), key=lambda row: -DTYPE_BYTES[row[1][0]]
        ):
            begin = len(data)
            data += self.ones.get(dtype, bytes(DTYPE_BYTES[dtype])) * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, len(data)]}
        text = json.dumps(header).encode()
        files = {
            "config.json": json.dumps(self.config).encode(),
            "tokenizer.json": b"{}",
            "model.safetensors": len(text).to_bytes(8, "little") + text + data,
        }
        files |= {name: json.dumps(content).encode() for name, content in self.beside.items()}
        return inspect_files(files)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = layout(tmp_path_factory.mktemp("forms"), variant)
        return made[variant]

    return get


def _beside(case: Case) -> None:
    case.beside["hf_quant_config.json"] = case.config.pop("quantization_config")


def _older_key(case: Case) -> None:
    case.config["compression_config"] = case.config.pop("quantization_config")


def _spelled(case: Case) -> None:
    case.config["quantization_config"]["quant_method"] = "Compressed_Tensors"


def _no_number(case: Case) -> None:
    del case.config["num_nextn_predict_layers"]
    case.drop("mtp.")


def _by_transformers(case: Case) -> None:
    names = {0: "sliding_attention", 4: "compressed", 128: "heavily_compressed"}
    ratios = case.config.pop("compress_ratios")
    case.config["layer_types"] = [names[ratio] for ratio in ratios[:3]]
    case.config["compress_rates"] = {"compressed": 4, "heavily_compressed": 128}
    case.config["mlp_layer_types"] = ["hash_moe", "moe", "moe"]
    del case.config["num_hash_layers"]


def _a_plain_layer(case: Case) -> None:
    case.drop("layers.0.ffn.experts.")
    hidden, width = case.config["hidden_size"], case.config["moe_intermediate_size"]
    for expert in range(case.config["n_routed_experts"]):
        for name, shape in (("w1", (width, hidden)), ("w2", (hidden, width))):
            case.rows[f"layers.0.ffn.experts.{expert}.{name}.weight"] = ("BF16", shape)
        case.rows[f"layers.0.ffn.experts.{expert}.w3.weight"] = ("BF16", (width, hidden))
    case.config["quantization_config"]["ignore"].append(r"re:.*\.layers\.0\.ffn\.experts\..*")


def _fp32_scales(value: float, case: Case) -> None:
    case.dtype("attn.wq_a.scale", "F32")
    case.ones["F32"] = struct.pack("<f", value)


def _quantization(case: Case, **change: Any) -> None:
    case.config["quantization_config"] |= change


def _group(part: str, case: Case, **change: Any) -> None:
    """Another attention group: of its weights or its input_activations."""
    group = case.config["quantization_config"]["config_groups"]["group_0"]
    group[part] = group[part] | change


def _ignore(*rules: str) -> Callable[[Case], None]:
    return lambda case: case.config["quantization_config"]["ignore"].extend(rules)


def _extra(name: str, dtype: str, *shape: int) -> Callable[[Case], None]:
    return lambda case: case.rows.update({name: (dtype, shape)})


def _half_scales(dtype: str, zero: bool, case: Case) -> None:
    case.dtype("_global_scale", dtype)
    case.ones[dtype] = bytes(2) if zero else {"BF16": b"\x80\x3f", "F16": b"\x00\x3c"}[dtype]


def _groups(case: Case, targets: str | None = None, **change: Any) -> None:
    """Both groups changed, without what is None; or another one for ``targets``."""
    groups = case.config["quantization_config"]["config_groups"]
    if targets is not None:
        groups["more"] = {"targets": [targets], **change}
        return
    for name, group in groups.items():
        groups[name] = {k: v for k, v in (group | change).items() if v is not None}


def _weights(case: Case, **change: Any) -> None:
    """Other arguments of the experts' weights."""
    case.config["quantization_config"]["config_groups"]["group_1"]["weights"] |= change


def _int4_groups_of_32(case: Case) -> None:
    _weights(case, group_size=32)
    for name, (dtype, (rows, columns)) in [
        (n, (d, s)) for n, (d, s) in case.rows.items() if ".experts." in n and len(s) == 2
    ]:
        if name.endswith(".weight_scale"):
            case.rows[name] = (dtype, (rows, 4 * columns))


def _by_the_class_of_linear_layers(case: Case) -> None:
    """The attention's group means them all; the experts' names its own."""
    case.config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear"]


def _experts_alone(case: Case, scheme: Any) -> None:
    case.config["quantization_config"]["config_groups"]["group_1"]["input_activations"] = scheme


def _nvfp4_wo_a(case: Case) -> None:
    groups = case.config["quantization_config"]["config_groups"]
    groups["group_0"]["targets"] = [r"re:.*\.attn\.(fused_wqa_wkv|wq_a|wkv|wq_b|wo_b)$"]
    groups["group_1"]["targets"] = ["Linear"]
    for layer in range(3):
        name = f"layers.{layer}.attn.wo_a"
        rows, columns = case.rows.pop(f"{name}.weight")[1]
        case.rows[f"{name}.weight_packed"] = ("U8", (rows, columns // 2))
        case.rows[f"{name}.weight_scale"] = ("F8_E4M3", (rows, columns // 16))
        case.rows[f"{name}.weight_global_scale"] = ("F32", ())
        case.rows[f"{name}.input_global_scale"] = ("F32", ())


def _signed_modelopt(case: Case) -> None:
    case.dtype(".weight_scale_2", "BF16")
    case.dtype(".input_scale", "BF16")
    case.dtype("layers.0.ffn.experts.0.w1.weight", "I8")


def _plain_wo_b(case: Case) -> None:
    name = "layers.0.attn.wo_b"
    case.rows[f"{name}.weight"] = ("BF16", case.rows[f"{name}.weight"][1])
    case.drop(f"{name}.scale")
    _quantization(case, ignored_layers=[f"model.{name}"])


TWO = "num_nextn_predict_layers"
# What was done -> variant, how; the outcome on each line; a word of the reason.
FORMS: dict[str, tuple[str, Callable[[Case], Any], tuple[str, str, str], str]] = {
    "quantization beside config.json": ("card", _beside, (MTP, MTP, MTP), ""),
    "quantization under its older key": ("card", _older_key, (MTP, MTP, MTP), ""),
    "another spelling": ("card", _spelled, (MTP, MTP, MTP), ""),
    "config by transformers": ("card", _by_transformers, (NOT, NOT, MTP), "layer_types alone"),
    "no architecture": (
        "card", lambda case: case.config.pop("architectures"), (NOT, NOT, MTP), "architecture",
    ),
    "no keys with a default": (
        "card", lambda case: [case.config.pop(key) for key in ("swiglu_limit", "topk_method")],
        (NOT, NOT, MTP), "swiglu_limit, topk_method",
    ),
    "ModelOpt with scales in BF16 and signed weights": (
        "nvidia-modelopt", _signed_modelopt, (WITHOUT, WITHOUT, MTP), "that vLLM converts",
    ),
    "another architecture": (
        "card", lambda case: case.config.update(architectures=["X"]), (NOT, NOT, NOT), "another",
    ),
    "no number of draft layers": ("card", _no_number, (WITHOUT, WITHOUT, WITHOUT), ""),
    "a drafter that is not promised": (
        "card", lambda case: case.config.update({TWO: 0}), (WITHOUT, WITHOUT, WITHOUT),
        "does not promise",
    ),
    "two promised, one there": (
        "card", lambda case: case.config.update({TWO: 2}), (WITHOUT, WITHOUT, WITHOUT),
        "not complete",
    ),
    "model. before layers": (
        "card", lambda case: case.rename("layers.", "model.layers."), (MTP, MTP, MTP), "",
    ),
    "model. before head": (
        "card", lambda case: case.rename("head.", "model.head."), (NOT, NOT, NOT), "model.head",
    ),
    "model. before mtp": (
        "card", lambda case: case.rename("mtp.", "model.mtp."), (WITHOUT, WITHOUT, WITHOUT),
        "model.mtp",
    ),
    "the drafter under its number": (
        "card", lambda case: case.rename("mtp.0.", "layers.3."), (NOT, NOT, NOT), "under mtp.0",
    ),
    "one layer's experts plain": ("card", _a_plain_layer, (MTP, MTP, MTP), ""),
    "E8M0 scales in a group": (
        "card", lambda case: case.dtype("attn.wo_b.weight_scale", "F8_E8M0"), (MTP, MTP, MTP),
        "that vLLM converts",
    ),
    "F64 scales in a group": (
        "card", lambda case: case.dtype("attn.wo_b.weight_scale", "F64"), (NOT, NOT, NOT),
        "wrong dtype",
    ),
    "FP32 scales that are powers of two": (
        "native-fp8-mxfp4", lambda case: case.dtype("attn.wq_a.scale", "F32"), (MTP, MTP, MTP), "",
    ),
    "FP32 scales that are not": (
        "native-fp8-mxfp4", partial(_fp32_scales, 1.5), (NOT, NOT, NOT), "not powers of two",
    ),
    "FP32 scales that are infinite": (
        "native-fp8-mxfp4", partial(_fp32_scales, inf), (NOT, NOT, NOT), "not powers of two",
    ),
    "a scale of the drafter is missing": (
        "native-fp8-mxfp4", lambda case: case.drop("mtp.0.attn.wq_a.scale"),
        (WITHOUT, WITHOUT, WITHOUT), "scales are missing",
    ),
    "native layer that is excepted but FP8": (
        "native-fp8-mxfp4", partial(_quantization, ignored_layers=["layers.0.attn.wq_b"]),
        (NOT, NOT, NOT), "hides quantized weights",
    ),
    "native layer that is excepted and BF16": (
        "native-fp8-mxfp4", _plain_wo_b, (MTP, MTP, MTP), "",
    ),
    "native blocks of another size": (
        "native-fp8-mxfp4", partial(_quantization, weight_block_size=[64, 64]), (NOT, NOT, NOT),
        "weight_block_size is [64, 64]",
    ),
    "native without a block size": (
        "native-fp8-mxfp4",
        lambda case: case.config["quantization_config"].pop("weight_block_size"),
        (NOT, NOT, NOT), "weight_block_size is None",
    ),
    "native with static activations": (
        "native-fp8-mxfp4", partial(_quantization, activation_scheme="static"), (NOT, NOT, NOT),
        "activation_scheme is static",
    ),
    "group of other blocks": (
        "card", partial(_group, "weights", block_structure=[64, 64]), (NOT, NOT, NOT),
        "arguments do not fit",
    ),
    "group with zero points": (
        "card", partial(_group, "weights", symmetric=False), (NOT, NOT, NOT),
        "arguments do not fit",
    ),
    "group with static activations": (
        "card", partial(_group, "input_activations", dynamic=False), (NOT, NOT, NOT),
        "arguments do not fit",
    ),
    "group in capitals": (
        "card", partial(_group, "weights", type="FLOAT", strategy="BLOCK"), (MTP, MTP, MTP), "",
    ),
    "sparsity": (
        "card", partial(_quantization, sparsity_config={"format": "dense", "targets": ["Linear"]}),
        (NOT, NOT, NOT), "sparsity_config",
    ),
    "sparsity of nothing": (
        "card", partial(_quantization, sparsity_config={"format": "dense"}), (MTP, MTP, MTP), "",
    ),
    "ignore is null": ("card", partial(_quantization, ignore=None), (NOT, NOT, NOT), "is null"),
    "a class before names": ("card", _by_the_class_of_linear_layers, (MTP, MTP, MTP), ""),
    "a group for the cache": (
        "card", partial(_groups, targets="LlamaAttention", weights=None), (MTP, MTP, MTP), "",
    ),
    "blocks as a word": (
        "card", partial(_group, "weights", block_structure="128x128"), (MTP, MTP, MTP), "",
    ),
    "weights that are dynamic": (
        "card", partial(_group, "weights", dynamic=True), (NOT, NOT, NOT), "arguments do not fit",
    ),
    "no format of FP8": ("card", partial(_groups, format=None), (NOT, NOT, NOT), "format"),
    "a format for INT4 that is not": (
        "w4a16-fp8-mtp", partial(_groups, format="int-quantized"), (NOT, NOT, NOT), "format",
    ),
    "NVFP4 with FP8 activations": (
        "card", partial(_experts_alone, scheme=ATTENTION["input_activations"]), (NOT, NOT, NOT),
        "activations differ",
    ),
    "INT4 with FP8 activations": (
        "w4a16-fp8-mtp", partial(_experts_alone, scheme=ATTENTION["input_activations"]),
        (NOT, NOT, NOT), "activations differ",
    ),
    "INT4 in groups of 32": ("w4a16-fp8-mtp", _int4_groups_of_32, (MTP, MTP, MTP), ""),
    "INT4 that states groups of 32": (
        "w4a16-fp8-mtp", partial(_weights, group_size=32), (NOT, NOT, NOT), "wrong dtype or shape",
    ),
    "INT4 without a strategy": (
        "w4a16-fp8-mtp", partial(_weights, strategy=None), (MTP, MTP, MTP), "",
    ),
    "wo_a in NVFP4": ("card", _nvfp4_wo_a, (NOT, NOT, NOT), "wo_a has 4 bits"),
    "half of a fused module ignored": (
        "card", _ignore(r"re:.*layers\.0\.attn\.wq_a$"), (MTP, MTP, NOT), "part of a fused module",
    ),
    "global scales in BF16": (
        "card", partial(_half_scales, "BF16", False), (MTP, MTP, MTP), "that vLLM converts",
    ),
    "global scales in FP16": (
        "card", partial(_half_scales, "F16", False), (MTP, MTP, MTP), "that vLLM converts",
    ),
    "global scales of zero in BF16": (
        "card", partial(_half_scales, "BF16", True), (NOT, NOT, NOT), "not positive numbers",
    ),
    "FP16": (
        "card", lambda case: case.config.update(torch_dtype="float16"), (NOT, NOT, NOT),
        "asks for FP16",
    ),
    "scale of inputs that nothing reads": (
        "card", _extra("layers.0.attn.wq_b.input_scale", "F32", 1), (NOT, NOT, NOT),
        "the format does not have",
    ),
    "shape of NVFP4": (
        "card", _extra("layers.0.ffn.experts.0.w1.weight_shape", "I64", 2), (NOT, NOT, NOT),
        "the format does not have",
    ),
    "empty zero point": (
        "card", _extra("layers.0.attn.wq_b.weight_zero_point", "I8", 0), (NOT, NOT, NOT),
        "the format does not have",
    ),
    "order of a group without one": (
        "w4a16-fp8-mtp", _extra("layers.0.ffn.experts.0.w1.weight_g_idx", "I32", 256),
        (MTP, MTP, NOT), "the format does not have",
    ),
    "a buffer that vLLM skips": (
        "card", lambda case: case.rows.update({"layers.0.attn.rotary_emb.inv_freq": ("F32", (1,))}),
        (MTP, MTP, MTP), "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_judged_as_vllm_takes_it(name: str, folders: Callable[[str], Path]) -> None:
    variant, change, outcomes, words = FORMS[name]
    case = Case(folders(variant))
    change(case)
    report = case.report()
    told = " ".join(f"{f.title}: {f.what}; {f.remedy}" for f in report.findings)
    assert tuple(str(verdict.outcome) for verdict in report.lines) == outcomes, told
    assert words in told


class TestPlaces:
    def test_a_name_that_is_too_long_is_reported(self) -> None:
        with pytest.raises(CheckpointUnreadableError, match="too long"):
            find_source("x" * 5000)

    def test_a_repository_of_the_cache_is_not_a_revision(self, tmp_path: Path) -> None:
        (tmp_path / "snapshots").mkdir()
        with pytest.raises(CheckpointUnreadableError, match="not one of its revisions"):
            find_source(str(tmp_path))

    def test_a_config_that_is_too_long_is_reported(self, tmp_path: Path) -> None:
        with (tmp_path / "config.json").open("wb") as file:
            file.truncate(MAX_TEXT + 1)  # a hole
        with pytest.raises(CheckpointUnreadableError, match="bytes, more than"):
            Checkpoint.open(Folder(tmp_path))

    def test_folder_that_is_not_utf8_can_be_printed(self, tmp_path: Path) -> None:
        folder = tmp_path / "\udcff\x1b"
        folder.mkdir()
        assert str(Folder(folder)).endswith("\\udcff\\x1b")
