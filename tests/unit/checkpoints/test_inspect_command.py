"""The command: what it prints, what it leaves with, and what decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.layouts import layout
from vllm_forge.checkpoints.errors import (
    CheckpointDepartsError,
    CheckpointRefusedError,
    CheckpointUnreadableError,
)
from vllm_forge.checkpoints.inspect.dry_load import Answer
from vllm_forge.cli import main
from vllm_forge.errors import UsageError
from vllm_forge.matrix.errors import UnknownLineError
from vllm_forge.project import Project
from vllm_forge.proofs import environment as proof

if TYPE_CHECKING:
    from collections.abc import Callable

REFUSED = CheckpointRefusedError.exit_code
DEPARTS = CheckpointDepartsError.exit_code
UNREADABLE = CheckpointUnreadableError.exit_code
CLEAN = Answer.model_validate({"target": {"error": None}, "drafts": {"mtp": {"error": None}}})


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("command")
    return lambda variant: layout(folder, variant)


@pytest.fixture(autouse=True)
def _here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))


def _run(folder: Path, *options: str) -> int:
    return main(["checkpoint", "inspect", str(folder), "--resolve=rules", *options])


@pytest.mark.parametrize(
    ("variant", "options", "code"),
    [
        ("card", [], 0),
        ("card", ["--line", "0.33"], 0),
        ("bf16", [], 0),
        ("partial-mtp", [], REFUSED),
        ("partial-mtp", ["--without-mtp"], 0),
        ("no-aliases", [], 0),
        ("no-aliases", ["--manifest", "flash-nvfp4-fp8-mtp"], DEPARTS),
        ("redhat-no-mtp", [], REFUSED),
        ("redhat-no-mtp", ["--without-mtp"], 0),
        ("dspark", [], REFUSED),
        ("dspark", ["--without-mtp"], 0),
        ("missing-experts", ["--without-mtp"], REFUSED),
        ("old-expert-targets", [], 0),
        ("old-expert-targets", ["--line", "0.33"], REFUSED),
        ("unfused-targets", [], REFUSED),
        ("unfused-targets", ["--line", "0.33"], 0),
        ("downcast", [], DEPARTS),
        ("literal-ignore", ["--without-mtp"], DEPARTS),
        ("card", ["--manifest", "bf16"], DEPARTS),
    ],
)
def test_leaves_with_the_code_of_what_is_wrong(
    variant: str, options: list[str], code: int, layouts: Callable[[str], Path]
) -> None:
    assert _run(layouts(variant), *options) == code


def _report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_json_is_the_whole_report(
    layouts: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(layouts("card"), "--json") == 0
    report = _report(capsys)
    assert list(report) == [
        "schema_version", "place", "read", "artifact", "asked", "resembles", "drafter", "promised",
        "tensors", "draft_tensors", "shards", "bytes", "config", "parts", "values", "findings",
        "lines",
    ]  # fmt: skip
    assert (report["schema_version"], report["artifact"]) == (2, "flash-nvfp4-fp8-mtp")
    assert [line["line"] for line in report["lines"]] == ["0.22", "0.26", "0.33"]
    experts = next(row for row in report["parts"] if row["part"] == "experts")
    assert experts == {
        "part": "experts", "draft": False, "tensors": 288, "formats": {"nvfp4": 72},
        "dtypes": {"F32": 144, "F8_E4M3": 72, "U8": 72},
    }  # fmt: skip


def test_third_partys_checkpoint_is_compared_with_no_manifest(
    layouts: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(layouts("no-aliases")) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not one of matrix.toml's artifacts; compared with none; checked: files" in out
    assert "most like flash-nvfp4-fp8-mtp: --manifest flash-nvfp4-fp8-mtp compares" in out
    assert "by the manifest of" not in out


def test_weights_only_nvfp4_serves(
    layouts: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(layouts("nvfp4a16-no-mtp")) == 0
    out = capsys.readouterr().out
    assert out.count("serves without MTP") == 3
    assert "scale per expert" not in out


def test_folder_of_the_hubs_cache_is_its_repositorys_artifact(
    layouts: Callable[[str], Path], tmp_path: Path
) -> None:
    repo = "models--canada-quant--DeepSeek-V4-Flash-NVFP4-FP8-MTP"
    folder = tmp_path / repo / "snapshots" / "0123"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(layouts("no-aliases"))
    assert _run(folder) == DEPARTS


def test_the_page_says_a_sentence_per_line(
    layouts: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(layouts("partial-mtp")) == REFUSED
    said = capsys.readouterr()
    assert said.out.count("serves without MTP") == 3
    assert "0.26 (vLLM 0.26.0): serves without MTP" in said.out
    assert "missing-mtp (G01): the drafter is not complete" in said.err
    assert "--without-mtp" in said.err


def test_an_index_alone_leaves_it_unknown(
    layouts: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    index = layouts("card") / "model.safetensors.index.json"
    assert _run(index, "--json") == REFUSED
    report = _report(capsys)
    assert report["read"] == "index"
    assert {line["outcome"] for line in report["lines"]} == {"unknown"}
    assert "needs headers" in report["lines"][0]["why"][0]


def test_index_alone_gives_what_names_give(
    layouts: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    index = layouts("missing-experts") / "model.safetensors.index.json"
    assert _run(index, "--json") == REFUSED
    report = _report(capsys)
    assert {line["outcome"] for line in report["lines"]} == {"does not serve"}
    assert "missing-experts" in {finding["check"] for finding in report["findings"]}


def test_a_dry_load_needs_headers(layouts: Callable[[str], Path]) -> None:
    index = layouts("card") / "model.safetensors.index.json"
    code = main(["checkpoint", "inspect", str(index), "--resolve=vllm"])
    assert code == UsageError.exit_code


def test_source_shows_what_was_rounded(
    layouts: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(layouts("downcast"), "--json", "--source", str(layouts("bf16"))) == DEPARTS
    titles = {f["title"] for f in _report(capsys)["findings"] if f["check"] == "rounded"}
    assert titles == {"FP32 tensors were rounded", "tensors are narrower than in the source"}
    assert _run(layouts("card"), "--source", str(layouts("bf16"))) == 0


@pytest.mark.parametrize("options", [["--values", "1"], ["--values", "-1", "--source", "x"]])
def test_values_need_a_source(options: list[str], layouts: Callable[[str], Path]) -> None:
    assert _run(layouts("card"), *options) == UsageError.exit_code


def test_values_are_compared(
    layouts: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A layout's weights all mean one, as its source's do."""
    assert _run(layouts("card"), "--json", "--values", "1", "--source", str(layouts("bf16"))) == 0
    rows = _report(capsys)["values"]
    assert {row["weights"] for row in rows} == {1}
    assert {row["worst"] for row in rows} == {None, 0.0}
    code = _run(layouts("downcast"), "--json", "--values", "0", "--source", str(layouts("bf16")))
    assert code == DEPARTS
    assert {f["title"] for f in _report(capsys)["findings"] if f["check"] == "values"} == {
        "bytes are not the source's"
    }


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], UNREADABLE, "is not a directory"),
        (["nowhere", "--manifest", "nvidia-nvpf4"], 2, "did you mean 'nvidia-nvfp4'"),
        (["nowhere", "--line", "0.27"], UnknownLineError.exit_code, "0.27"),
        (["nowhere", "--resolv", "vllm"], 2, "--resolve"),
    ],
)
def test_bad_arguments_are_reported(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "inspect", *arguments]) == code
    assert words in " ".join(capsys.readouterr().err.split())


class TestDryLoad:
    def test_rules_judge_where_it_is_not_ready_and_that_is_reported(
        self,
        layouts: Callable[[str], Path],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(proof, "ready", lambda *_: "nothing is built")
        assert main(["checkpoint", "inspect", str(layouts("card")), "--json"]) == 0
        said = capsys.readouterr()
        assert said.err.count("without its vLLM: nothing is built") == 3
        by = {line["by"] for line in json.loads(said.out)["lines"]}
        assert by == {"the matching rules of compressed-tensors"}

    def test_where_it_is_ready_it_has_the_last_word(
        self,
        layouts: Callable[[str], Path],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        asked: list[str] = []

        def dry_load(_project: object, line: str, *_: object) -> dict[str, Answer]:
            asked.append(line)
            return {"checkpoint": CLEAN}

        monkeypatch.setattr(proof, "ready", lambda *_: "")
        monkeypatch.setattr(proof, "dry_load", dry_load)
        code = main(["checkpoint", "inspect", str(layouts("unfused-targets")), "--json"])
        assert code == 0
        report = _report(capsys)
        assert asked == ["0.22", "0.26", "0.33"]
        assert {line["by"] for line in report["lines"]} == {
            f"vLLM {v} itself, in a dry load" for v in ("0.22.1", "0.26.0", "0.33.0")
        }

    def test_a_host_that_cannot_mount_is_reported(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:

        monkeypatch.setattr("os.geteuid", lambda: 1000)
        assert "root" in proof.ready(Project(root), "0.26")
        monkeypatch.setattr("os.geteuid", lambda: 0)
        monkeypatch.setattr(proof, "which", lambda _: None)
        assert proof.ready(Project(root), "0.26") == "buildah, runc, unshare not installed"
