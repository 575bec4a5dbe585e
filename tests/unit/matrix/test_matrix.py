"""matrix.toml: what is allowed, what is refused, and how the refusal reads."""

from __future__ import annotations

import json
import shutil
import tomllib
from typing import TYPE_CHECKING, Any

import pydantic
import pytest

from vllm_forge.cli import main
from vllm_forge.matrix import Matrix, image_cell, load
from vllm_forge.matrix.cells import schema_text
from vllm_forge.matrix.errors import (
    MatrixFileError,
    MatrixValueError,
    UnknownLineError,
    UnknownSkuError,
    UnsupportedCellError,
)
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Data = dict[str, Any]


def to_toml(value: Any, place: tuple[str, ...] = ()) -> str:
    """Enough of TOML for the matrix: scalars and lists in a table first, then its tables."""
    lines: list[str] = []
    tables: list[str] = []
    for key, item in value.items():
        path = (*place, json.dumps(key))
        if isinstance(item, dict):
            tables.append(f"[{'.'.join(path)}]\n{to_toml(item, path)}")
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            tables += [f"[[{'.'.join(path)}]]\n{to_toml(row, path)}" for row in item]
        else:
            lines.append(f"{json.dumps(key)} = {json.dumps(item)}\n")
    return "".join(lines) + "".join(tables)


@pytest.fixture
def data(root: Path) -> Data:
    """The committed matrix, to be changed."""
    return tomllib.loads((root / "matrix.toml").read_text())


@pytest.fixture
def loads(tmp_path: Path) -> Callable[[Data], Matrix]:
    """Write a matrix.toml and load it."""

    def write_and_load(changed: Data) -> Matrix:
        (tmp_path / "matrix.toml").write_text(to_toml(changed))
        return load(tmp_path)

    return write_and_load


def test_committed_matrix_loads(root: Path) -> None:
    matrix = load(root)
    assert {"b200", "b300", "rtxpro6000", "h200"} <= set(matrix.sku)
    assert {"0.22", "0.26", "0.33"} <= set(matrix.line)
    assert matrix.default_line in matrix.line


def test_the_writer_of_this_module_changes_nothing(
    root: Path, data: Data, loads: Callable[[Data], Matrix]
) -> None:
    assert loads(data) == load(root)


# Where a row of each type is in the committed matrix: one path per type, nested rows too.
ROWS: dict[str, list[str | int]] = {
    "Matrix": [],
    "Base": ["base"],
    "LayerRule": ["layers", 0],
    "WheelFile": ["wheel_file", 0],
    "Sku": ["sku", "b300"],
    "Line": ["line", "0.26"],
    "PinnedRequirement-constraint": ["line", "0.26", "constraints", 1],
    "PinnedRequirement-override": ["line", "0.33", "overrides", 0],
    "Artifact": ["artifact", "flash-nvfp4-fp8-mtp"],
    "Unserved": ["artifact", "nvidia-nvfp4", "unserved", 0],
    "Preset": ["preset", "b300-mtp"],
    "Cuda": ["cuda", "13.0"],
    "Chat": ["line", "0.26", "chat"],
    "GpuMemory": ["gpu_memory", "h200"],
    "KernelModules": ["kernel_modules"],
    "Container": ["container"],
    "ReleasePolicy": ["release", "release"],
    "Gate": ["gate", "strict"],
    "UnsupportedSku": ["unsupported_sku", "gb300"],
    "RetiredVariable": ["retired", "VLLM_TEST_FORCE_FP8_MARLIN"],
}


def at(data: Any, path: list[str | int]) -> Any:
    for part in path:
        data = data[part]
    return data


def test_every_row_type_is_in_the_table_above() -> None:
    definitions = set(json.loads(schema_text())["$defs"]) | {"Matrix"}
    assert {name.partition("-")[0] for name in ROWS} == definitions


@pytest.mark.parametrize("kind", ROWS)
def test_unknown_key_is_refused_with_the_nearest_known_one(
    kind: str, data: Data, loads: Callable[[Data], Matrix]
) -> None:
    row = at(data, ROWS[kind])
    known = max((key for key in row if key.isidentifier()), key=len)
    typo = known[:-1] + "xx"
    row[typo] = 1
    with pytest.raises(MatrixValueError) as refused:
        loads(data)
    place = ".".join(str(part) for part in [*ROWS[kind], typo])
    assert f"unknown key {place} (" in str(refused.value)
    assert f"did you mean '{known}'?" in str(refused.value)


@pytest.mark.parametrize("kind", ROWS)
def test_unknown_key_like_nothing_known_lists_the_fields(
    kind: str, data: Data, loads: Callable[[Data], Matrix]
) -> None:
    at(data, ROWS[kind])["qqqqqq"] = 1
    with pytest.raises(MatrixValueError, match=r"qqqqqq \(known: [a-z]+"):
        loads(data)


def without(*path: str | int) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        del at(data, list(path[:-1]))[path[-1]]

    return change


def put(*path_and_value: Any) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        *path, last, value = path_and_value
        at(data, path)[last] = value

    return change


LINE = ("line", "0.26")


def dspark(**fields: Any) -> Callable[[Data], None]:
    """A preset for the artifact with a DSpark drafter, with some fields changed."""
    row = {
        "sku": "b300", "artifacts": ["deepseek-v4-flash-0731"], "tensor_parallel": 4,
        "speculative_tokens": 5, "speculative_method": "dspark", "note": "a preset of this test",
    }  # fmt: skip

    def change(data: Data) -> None:
        data["artifact"]["deepseek-v4-flash-0731"].pop("unasked", None)
        data["preset"]["b300-dspark"] = row | fields

    return change


REFUSED: dict[str, tuple[Callable[[Data], None], list[str]]] = {
    "text-for-number": (put("sku", "b300", "memory_gb", "many"), ["sku.b300.memory_gb", "integer"]),
    "digits-in-quotes": (put("sku", "b300", "memory_gb", "288"), ["sku.b300.memory_gb", "integer"]),
    "bool-for-number": (put("base", "budget_mb", True), ["base.budget_mb", "integer"]),
    "text-for-bool": (put("sku", "b300", "development", "yes"), ["sku.b300.development", "bool"]),
    "number-for-text": (put("sku", "b300", "device", 3), ["sku.b300.device", "string"]),
    "number-in-env": (put("sku", "b300", "env", {"A": 1}), ["sku.b300.env.A", "string"]),
    "text-for-list": (put(*LINE, "skus", "b300"), ["line.0.26.skus", "a list"]),
    "text-for-table": (put("base", "trixie"), ["base"]),
    "arch-form": (put("sku", "b300", "arch", "103"), ["sku.b300.arch", "pattern"]),
    "capability-form": (put("sku", "b300", "compute_capability", "10"), ["compute_capability"]),
    "arch-of-another-gpu": (put("sku", "b300", "arch", "sm_100a"), ["sku.b300: arch", "10.3"]),
    "jit-for-another-gpu": (
        put("sku", "b300", "env", {"TORCH_CUDA_ARCH_LIST": "10.0a"}),
        ["sku.b300: arch", "10.0a"],
    ),
    "no-memory": (put("sku", "b300", "memory_gb", 0), ["sku.b300.memory_gb", "greater than"]),
    "no-budget": (put("base", "budget_mb", -1), ["base.budget_mb", "greater than"]),
    "port": (put("container", "port", 80000), ["container.port", "less than"]),
    "flag-with-a-key": (
        put("preset", "b300-mtp", "flags", ["--tensor-parallel-size=8"]),
        ["preset.b300-mtp: flags: --tensor-parallel-size"],
    ),
    "flag-of-serve": (
        put("preset", "b300-mtp", "flags", ["--port=9"]),
        ["preset.b300-mtp: flags: --port"],
    ),
    "line-without-quotes": (put("line", "0", {"27": {}}), ["unknown key line.0.27", "quotes"]),
    "python-form": (put(*LINE, "python", "2.7"), ["line.0.26.python", "pattern"]),
    "row-name": (put("sku", "B 300", {}), ["sku", "pattern"]),
    "unknown-stage": (put("release", "final", {}), ["release.final", "'dev', 'candidate'"]),
    "unknown-statement": (put("release", "dev", "statements", ["spdx"]), ["'vex'"]),
    "no-builder": (put("release", "release", "builders", 0), ["release.release.builders"]),
    "unknown-choice": (put("artifact", "nvidia-nvfp4", "experts", "int3"), ["nvfp4", "w4a16"]),
    "negative-tokens": (put("preset", "b300-mtp", "speculative_tokens", -1), ["greater than"]),
    "short-reason": (put(*LINE, "constraints", 0, "reason", "because"), ["constraints.0.reason"]),
    "other-schema-version": (put("schema_version", 2), ["schema_version"]),
    "no-base": (without("base"), ["base: Field required"]),
    "no-arch": (without("sku", "b300", "arch"), ["sku.b300.arch: Field required"]),
    "no-vllm": (without(*LINE, "vllm"), ["line.0.26.vllm: Field required"]),
    "no-reason": (without(*LINE, "constraints", 0, "reason"), ["constraints.0.reason: Field req"]),
    "no-default-line": (without(*LINE), ["default_line", "0.26"]),
    "sku-of-a-line-has-no-row": (put(*LINE, "skus", ["b301"]), ["line.0.26", "sku.b301"]),
    "unsupported-sku-has-no-row": (
        put(*LINE, "unsupported", {"b301": "there is no such product at all"}),
        ["line.0.26", "sku.b301"],
    ),
    "sku-neither-supported-nor-not": (
        put(*LINE, "skus", ["b200", "b300", "h200"]),
        ["line.0.26", "skus or in unsupported", "rtxpro6000"],
    ),
    "sku-both-supported-and-not": (
        put(*LINE, "unsupported", {"b300": "a reason why it cannot"}),
        ["line.0.26", "both", "b300"],
    ),
    "preset-of-no-sku": (put("preset", "b300-mtp", "sku", "b301"), ["preset.b300-mtp", "b301"]),
    "preset-of-no-artifact": (
        put("preset", "b300-mtp", "artifacts", ["x"]),
        ["preset.b300-mtp", "artifact.x"],
    ),
    "preset-of-nothing": (put("preset", "b300-mtp", "artifacts", []), ["preset.b300-mtp"]),
    "preset-of-another-sku": (put("preset", "b300-mtp", "sku", "b200"), ["start with b200-"]),
    "drafts-without-mtp": (
        put("preset", "b300-mtp", "artifacts", ["redhat-nvfp4-fp8"]),
        ["preset.b300-mtp", "redhat-nvfp4-fp8 has no MTP"],
    ),
    "preset-of-unknown-config": (
        put("preset", "b300-plain", "artifacts", ["flash-w4a16-fp8"]),
        ["preset.b300-plain", "flash-w4a16-fp8 is not served: its config.json is not published"],
    ),
    "k-beyond-the-block": (
        dspark(speculative_tokens=7),
        ["preset.b300-dspark", "drafts blocks of 5 tokens, not 7"],
    ),
    "other-drafter": (
        dspark(speculative_method="mtp"),
        ["preset.b300-dspark", "has a drafter for method dspark, not mtp"],
    ),
    "unserved-on-no-line": (
        put("artifact", "nvidia-nvfp4", "unserved", 0, "lines", ["0.22", "0.27"]),
        ["artifact.nvidia-nvfp4.unserved", "line.'0.27'"],
    ),
    "unserved-on-no-sku": (
        put("artifact", "nvidia-nvfp4", "unserved", 0, "skus", ["b400"]),
        ["artifact.nvidia-nvfp4.unserved", "sku.b400"],
    ),
    "unserved-nowhere": (
        put("artifact", "nvidia-nvfp4", "unserved", 0, "lines", []),
        ["artifact.nvidia-nvfp4.unserved.0.lines"],
    ),
    "unserved-without-words": (
        put("artifact", "nvidia-nvfp4", "unserved", 0, "reason", "broken"),
        ["artifact.nvidia-nvfp4.unserved.0.reason"],
    ),
    "cuda-without-driver": (put(*LINE, "cuda", "13.9"), ["line.0.26", "cuda.'13.9'"]),
    "support-of-no-line": (put("support", "0.27", "2027-06-30"), ["support: no", "line.'0.27'"]),
    "support-until-no-day": (put("support", "0.26", "next year"), ["support.0.26", "valid date"]),
    "no-last-layer": (put("layers", -1, "match", ["t*"]), ["layers", "*"]),
    "no-layers": (put("layers", []), ["layers"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_value_is_refused_with_its_place(
    name: str, data: Data, loads: Callable[[Data], Matrix], tmp_path: Path
) -> None:
    change, words = REFUSED[name]
    change(data)
    with pytest.raises(MatrixValueError) as refused:
        loads(data)
    for word in [*words, str(tmp_path / "matrix.toml"), "matrix.schema.json"]:
        assert word in str(refused.value)


def test_all_faults_are_in_one_message(data: Data, loads: Callable[[Data], Matrix]) -> None:
    del data["sku"]["b300"]["arch"]
    data["base"]["siute"] = "trixie"
    data["preset"]["b300-mtp"]["tensor_parallel"] = "four"
    with pytest.raises(MatrixValueError) as refused:
        loads(data)
    for word in ["sku.b300.arch", "base.siute", "'suite'", "preset.b300-mtp.tensor_parallel"]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"schema_version = \n", "invalid matrix.toml: .* line 1"),
        (b"a = 1\na = 2\n", "line 2"),
        (b'device = "caf\xe9"\n', "(?s)0xe9.*TOML in UTF-8"),
    ],
)
def test_not_toml(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "matrix.toml").write_bytes(content)
    with pytest.raises(MatrixFileError, match=words):
        load(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MatrixFileError, match=r"missing matrix\.toml"):
        load(tmp_path)


def test_committed_schema_is_the_models(root: Path) -> None:
    assert (root / "matrix.schema.json").read_text() == schema_text()


@pytest.mark.parametrize("kind", ROWS)
def test_records_are_frozen(kind: str, root: Path) -> None:
    row: Any = load(root)
    for part in ROWS[kind]:
        row = getattr(row, part) if isinstance(part, str) and hasattr(row, part) else row[part]
    for name in type(row).model_fields:
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(row, name, getattr(row, name))


@pytest.mark.parametrize(
    ("line", "drafting", "expected"),
    [
        ("0.33", False, "only not on this one SKU"),
        ("0.22", True, "never, with a draft or without"),
        ("0.22", False, "never, with a draft or without"),
        ("0.26", True, "only without a draft layer"),
        ("0.26", False, None),
    ],
)
def test_why_an_artifact_is_not_served(
    line: str, drafting: bool, expected: str | None, data: Data, loads: Callable[[Data], Matrix]
) -> None:
    data["artifact"]["nvidia-nvfp4"]["unserved"] = [
        {"lines": ["0.26"], "drafting": True, "reason": "only without a draft layer"},
        {"lines": ["0.22"], "reason": "never, with a draft or without"},
        {"lines": ["0.33"], "skus": ["b300"], "reason": "only not on this one SKU"},
        {"lines": ["0.26"], "skus": ["b200"], "reason": "only not on another SKU"},
    ]
    row = loads(data).artifact["nvidia-nvfp4"]
    assert row.why_not(line, "b300", drafting=drafting) == expected


@pytest.mark.parametrize(
    ("asked", "sku"),
    [
        ("b300", "b300"),
        ("sm_103a", "b300"),
        ("sm103a", "b300"),
        ("sm_120", "rtxpro6000"),
        ("sm120", "rtxpro6000"),
        ("rtxpro6000", "rtxpro6000"),
        ("sm_90a", "h200"),
        ("B300", "b300"),
        ("RTXPRO6000", "rtxpro6000"),
        ("SM_103a", "b300"),
    ],
)
def test_cell_by_sku_or_arch(asked: str, sku: str, root: Path) -> None:
    matrix = load(root)
    cell = image_cell(matrix, asked)
    assert (cell.sku_name, cell.line_name) == (sku, matrix.default_line)
    assert cell.sku is matrix.sku[sku]
    assert cell.name == f"vllm-{matrix.line[matrix.default_line].vllm}-{sku}"


@pytest.mark.parametrize("asked", ["", "b30", "sm_103", "103a", "b 300"])
def test_cell_of_no_sku(asked: str, root: Path) -> None:
    with pytest.raises(UnknownSkuError, match=r"b300 \(sm_103a\)"):
        image_cell(load(root), asked)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("gb300", "Arm"),
        ("GB200", "Arm"),
        ("gb10", "Arm"),
        ("DGX-Spark", "Arm"),
        ("RTX 5090", "32 GB"),
        ("5090", "32 GB"),
        ("h100", "development"),
    ],
)
def test_unsupported_sku_says_why(asked: str, why: str, root: Path) -> None:
    with pytest.raises(
        UnsupportedCellError, match=f"^{asked.lower()} is not supported: .*{why}"
    ) as e:
        image_cell(load(root), asked)
    assert "did you mean" not in str(e.value)
    assert "b300 (sm_103a)" in e.value.remedy


def test_sku_is_supported_or_not(data: Data, loads: Callable[[Data], Matrix]) -> None:
    data["unsupported_sku"]["b300"] = {"reason": "no reason of any kind whatever"}
    with pytest.raises(MatrixValueError, match=r"also in \[sku\]: \['b300'\]"):
        loads(data)


def test_cell_of_no_line(root: Path) -> None:
    with pytest.raises(UnknownLineError, match=r"0\.99"):
        image_cell(load(root), "b300", "0.99")


def test_lines_by_name_or_all(root: Path) -> None:
    project = Project(root)
    assert project.lines("0.33") == ["0.33"]
    assert project.lines(None) == list(project.matrix.line)
    for asked in ("0.34", ""):
        with pytest.raises(UnknownLineError):
            project.lines(asked)


def test_every_unsupported_cell_says_why_and_where_else(root: Path) -> None:
    matrix = load(root)
    cells = [
        (n, sku, why) for n, row in matrix.line.items() for sku, why in row.unsupported.items()
    ]
    assert cells
    for name, sku, why in cells:
        with pytest.raises(UnsupportedCellError) as refused:
            image_cell(matrix, sku, name)
        assert why in str(refused.value)
        assert f"matrix.toml, line.{name}.unsupported.{sku}" in str(refused.value)
        for other, row in matrix.line.items():
            if sku in row.skus:
                assert other in refused.value.remedy


def test_unsupported_everywhere_says_none(
    data: Data, loads: Callable[[Data], Matrix], root: Path
) -> None:
    data["sku"]["old"] = dict(data["sku"]["b300"], arch="sm_80", compute_capability="8.0", env={})
    for line in data["line"].values():
        line.setdefault("unsupported", {})["old"] = "it is too old for all of them"
    with pytest.raises(UnsupportedCellError, match="none does"):
        image_cell(loads(data), "sm80")


def test_arch_of_two_skus_must_be_asked_for_by_name(
    data: Data, loads: Callable[[Data], Matrix], root: Path
) -> None:
    data["sku"]["b300x"] = dict(data["sku"]["b300"])
    for line in data["line"].values():
        line["skus"].append("b300x")
    matrix = loads(data)
    assert image_cell(matrix, "b300x").sku_name == "b300x"
    with pytest.raises(UnknownSkuError) as refused:
        image_cell(matrix, "sm103a")
    assert "b300, b300x" in str(refused.value)


def test_a_new_sku_is_a_row_and_nothing_else(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only matrix.toml changes; the dry run then names the new SKU's image."""
    copy = tmp_path / "checkout"
    for folder in ("docker", "patches"):
        shutil.copytree(root / folder, copy / folder)
    row = (
        '\n[sku.fakegpu]\narch = "sm_199a"\ncompute_capability = "19.9"\n'
        'device = "NVIDIA Fake"\nmemory_gb = 1000\nenv = { TORCH_CUDA_ARCH_LIST = "19.9a" }\n'
    )
    text = (root / "matrix.toml").read_text()
    (copy / "matrix.toml").write_text(text.replace('skus = ["', 'skus = ["fakegpu", "') + row)
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(copy))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for asked in ("sm199a", "sm_199a", "fakegpu"):
        assert main(["build", asked, "--engine=buildah", "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert "-fakegpu" in out
        assert "buildah" in out
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    assert not (copy / "dist").exists()
