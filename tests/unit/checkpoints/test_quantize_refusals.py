"""What a quantization refuses, when, and with which words; what it would do, told beforehand."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.checkpoint_engine import make_job
from vllm_forge.checkpoints import tensors
from vllm_forge.checkpoints.checkpoint import MAX_TEXT
from vllm_forge.checkpoints.errors import ModelInputError, ResumeError
from vllm_forge.checkpoints.quantize.quantizer import check_output, quantize
from vllm_forge.checkpoints.tensors import in_memory, write_shard
from vllm_forge.cli import main
from vllm_forge.errors import UsageError
from vllm_forge.host.errors import DiskSpaceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm_forge.checkpoints.quantize.quantizer import Job
    from vllm_forge.checkpoints.tensors import TensorToWrite


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path / "bf16")


def _failing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file of the artifact meets an error of the file system."""
    write, calls = write_shard, []

    def refuse(path: Path, items: Iterable[TensorToWrite]) -> dict[str, str]:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(number, "said the kernel", str(path))
        return write(path, items)

    monkeypatch.setattr(tensors, "write_shard", refuse)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_others_fill_stops_it_and_the_rest_is_made_later(
    number: int, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _failing(number, patch)
        with pytest.raises(DiskSpaceError, match="the run was ended") as caught:
            quantize(job, tmp_path / "out")
    assert "same command again" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    assert quantize(job, tmp_path / "out")


def test_a_disk_that_may_not_be_written_is_reported(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing(errno.EROFS, monkeypatch)
    with pytest.raises(UsageError, match="cannot write: said the kernel"):
        quantize(job, tmp_path / "out")


@pytest.mark.parametrize("make", [lambda plan: plan.write_bytes(b"\xff"), os.mkfifo])
def test_plan_of_any_kind_beside_an_output_is_reported(
    make: Callable[[Path], object], job: Job, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    make(tmp_path / "out.partial/plan.json")
    with pytest.raises(ResumeError, match="cannot be read"):
        quantize(job, tmp_path / "out")


def test_invalid_plan_is_reported(job: Job, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    for text in ("{", "[]", "\0"):
        (tmp_path / "out.partial" / "plan.json").write_text(text)
        with pytest.raises(ResumeError, match="cannot be read"):
            quantize(job, tmp_path / "out")


@pytest.mark.parametrize("output", ["bf16", "bf16/inside", ".", "link/inside"])
def test_folders_in_each_other_are_refused(output: str, job: Job, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "bf16")
    with pytest.raises(UsageError, match="in each other"):
        quantize(job, tmp_path / output)
    assert not (tmp_path / "bf16" / "inside").exists()


def test_output_is_taken_unless_a_run_was_about_to_tidy_up(job: Job, tmp_path: Path) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    check_output(job.source.local.path, output)
    output.mkdir()
    for leftovers in ([], ["artifact"], ["artifact", "plan.json"]):
        for name in leftovers:
            (partial / name).mkdir(parents=True, exist_ok=True)
        with pytest.raises(ResumeError, match="the output exists"):
            check_output(job.source.local.path, output)
    (partial / "artifact").rmdir()
    check_output(job.source.local.path, output)


@pytest.mark.parametrize("name", ["", ".", "bf16/../..", "a/.."])
def test_an_output_without_a_name_of_its_own_exists(
    name: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "beside")
    with pytest.raises((ResumeError, UsageError), match=r"exists|in each other"):
        check_output(job.source.local.path, Path(name))


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "file/out"])
def test_impossible_output_is_reported(name: str, job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot create --output"):
        check_output(job.source.local.path, tmp_path / name)


def test_dangling_link_as_output_is_rejected(job: Job, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(ResumeError, match="a link to what is not there"):
        quantize(job, tmp_path / "out")


def test_a_model_that_goes_away_is_not_the_outputs_fault(job: Job, tmp_path: Path) -> None:
    for name in job.source.shards:
        job.source.local.files[name].unlink()
    with pytest.raises(ModelInputError, match="cannot be read: No such file"):
        quantize(job, tmp_path / "out")


class TestCommand:
    @pytest.fixture(autouse=True)
    def _here(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))

    def _run(self, *arguments: object) -> int:
        return main(["checkpoint", "quantize", *map(str, arguments)])

    def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
        self, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = sorted(tmp_path.rglob("*"))
        model = job.source.local.path
        assert self._run(f"--model={model}", f"--output={tmp_path / 'out'}", "--dry-run") == 0
        said = capsys.readouterr().out
        # 2 layers of 4 experts x 3 and 5 attention projections.
        assert "24 NVFP4" in said
        assert "10 FP8_BLOCK" in said
        assert f"{sum(n.startswith('mtp.') for n in job.source.tensors)} of mtp.*" in said
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("what", "code"),
        [
            ("nowhere", ModelInputError.exit_code),
            ("file", ModelInputError.exit_code),
            ("no index", ModelInputError.exit_code),
            ("index of a list", ModelInputError.exit_code),
            ("index that leaves", ModelInputError.exit_code),
            ("config of words", ModelInputError.exit_code),
            ("cut off", ModelInputError.exit_code),
            ("folder for a shard", ModelInputError.exit_code),
            ("output", ResumeError.exit_code),
        ],
    )
    def test_what_can_be_refused_is_before_any_tool(
        self, what: str, code: int, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model, output = job.source.local.path, tmp_path / "out"
        index = model / "model.safetensors.index.json"
        shard = job.source.local.files[job.source.shards[0]]
        match what:
            case "nowhere":
                model = tmp_path / "nowhere"
            case "file":
                model = model / "config.json"
            case "no index":
                index.unlink()
            case "index of a list":
                index.write_text('{"weight_map": []}')
            case "index that leaves":
                index.write_text('{"weight_map": {"a": "../x.safetensors"}}')
            case "config of words":
                config = json.loads((model / "config.json").read_text())
                (model / "config.json").write_text(json.dumps(config | {"hidden_size": "512"}))
            case "cut off":
                shard.write_bytes(shard.read_bytes()[:-1])
            case "folder for a shard":
                shard.unlink()
                shard.mkdir()
            case "output":
                output.mkdir()
        assert self._run(f"--model={model}", f"--output={output}") == code
        assert "where:" in capsys.readouterr().err
        shutil.rmtree(output, ignore_errors=True)
        assert not (tmp_path / "out.partial").exists()

    @pytest.mark.parametrize(
        "what",
        [
            "pipe for a shard", "pipe for a config", "config without end", "long name",
            "quantized under the older key", "alias of another shape",
        ],
    )  # fmt: skip
    def test_a_model_of_another_kind_of_file_or_form_is_refused(
        self, what: str, job: Job, tmp_path: Path
    ) -> None:
        model = job.source.local.path
        index, shard = (
            model / "model.safetensors.index.json",
            job.source.local.files[job.source.shards[0]],
        )
        match what:
            case "pipe for a shard":
                shard.unlink()
                os.mkfifo(shard)
            case "pipe for a config":
                (model / "config.json").unlink()
                os.mkfifo(model / "config.json")
            case "config without end":
                with (model / "config.json").open("wb") as file:
                    file.truncate(MAX_TEXT + 1)  # a hole
            case "long name":
                model = tmp_path / ("x" * 300)
            case "quantized under the older key":
                config = json.loads((model / "config.json").read_text())
                (model / "config.json").write_text(json.dumps(config | {"compression_config": {}}))
            case "alias of another shape":
                name, target = "mtp.0.head.weight", "model-00009-of-00009.safetensors"
                write_shard(model / target, [in_memory(name, "BF16", (1,), b"12")])
                rows = json.loads(index.read_text())
                rows["weight_map"][name] = target
                index.write_text(json.dumps(rows))
        code = self._run(f"--model={model}", f"--output={tmp_path / 'out'}")
        assert code == ModelInputError.exit_code
