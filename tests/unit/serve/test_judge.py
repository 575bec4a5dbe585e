"""Flags of a user's own: judged by recorded answers, else by the image's vLLM, else not at all."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.layouts import layout
from vllm_forge.cli import main
from vllm_forge.errors import UsageError
from vllm_forge.host import Runner
from vllm_forge.kernels.errors import SelectionFailedError
from vllm_forge.kernels.selection.questions import Refusal
from vllm_forge.kernels.selection.record import read_selection, write_selection
from vllm_forge.matrix import image_cell, load
from vllm_forge.matrix.errors import UnsupportedCellError
from vllm_forge.serve import judge
from vllm_forge.serve.deployment import Deployment, find_deployment
from vllm_forge.serve.errors import (
    HostUnfitError,
    ModelFolderError,
    NotJudgedError,
    PresetLintError,
)

ROOT = Path(__file__).parents[3]
MATRIX = load(ROOT)
RECORD = read_selection(ROOT / "records", "0.26")
QUESTION = "preset/rtxpro6000-tp2-mtp/flash-nvfp4-fp8-mtp"
ANSWER = RECORD.answers[QUESTION]


def deployment(*flags: str, env: tuple[str, ...] = ()) -> Deployment:
    found = find_deployment(MATRIX, image_cell(MATRIX, "rtxpro6000", "0.26"), "tp2-mtp")
    return replace(found, flags=flags, env=env)


@pytest.mark.parametrize(
    ("flags", "env", "covered"),
    [
        ((), (), True),
        (("--max-model-len=65536",), (), True),
        (("--max-model-len", "65536", "--served-model-name=a"), (), True),
        (("--gpu-memory-utilization=0.93",), (), True),
        ((), ("HF_TOKEN", "NCCL_DEBUG=INFO", "VLLM_API_KEY"), True),
        (("--max-model-len=262144",), (), False),  # longer than vLLM was asked about
        (("--max-model-len=auto",), (), False),
        (("--max-num-seqs=4",), (), False),
        (("--enforce-eager",), (), False),
        ((), ("VLLM_USE_BREAKABLE_CUDAGRAPH=0",), False),
        ((), ("VLLM_USE_BREAKABLE_CUDAGRAPH",), False),
    ],
)
def test_recorded_answers_cover_what_changes_no_kernel(
    flags: tuple[str, ...], env: tuple[str, ...], covered: bool
) -> None:
    asked = deployment(*flags, env=env)
    assert (judge.recorded(asked, RECORD.rows) is not None) is covered
    doubt = judge.require_served(asked, RECORD.rows, None, "docker")
    assert doubt == "" if covered else all(word.partition("=")[0] in doubt for word in flags + env)


def test_print_says_that_nobody_judged_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["serve", "--sku=rtxpro6000", "--preset=tp2-mtp", "--print"]
    assert main([*argv, "--", "--max-num-seqs=4"]) == 0
    out, err = capsys.readouterr()
    assert "NOT JUDGED: no recorded answer of line 0.26 covers --max-num-seqs=4" in err
    assert "--max-num-seqs=4" in out
    assert main([*argv, "--", "--max-model-len=65536"]) == 0
    assert "NOT JUDGED" not in capsys.readouterr().err


def test_print_refuses_what_vllm_refused(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = Refusal(kind="config", message="AssertionError: only supports fp8 kv-cache, got auto")
    rows = tuple(
        (q, a.model_copy(update={"refused": refused}) if q.name == QUESTION else a)
        for q, a in RECORD.rows
    )
    write_selection(checkout / "records", replace(RECORD, rows=rows))
    argv = ["serve", "--sku=rtxpro6000", "--preset=tp2-mtp", "--print"]
    assert main(argv) == PresetLintError.exit_code
    out, err = capsys.readouterr()
    assert (out, "only supports fp8 kv-cache, got auto" in err) == ("", True)


def test_print_refuses_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["serve", "--sku=rtxpro6000", "--preset=tp2-mtp", "--print", "--"]
    assert main([*argv, "--gpu-memory-utilization=0.85"]) == HostUnfitError.exit_code
    out, err = capsys.readouterr()
    assert (out, "84.2 GiB for the weights" in err) == ("", True)


def speculation(method: str, tokens: int) -> str:
    return f'--speculative-config={{"method":"{method}","num_speculative_tokens":{tokens}}}'


@pytest.mark.parametrize(
    ("where", "flags", "words"),
    [
        # A row [artifact.*.unserved] with drafting holds for a user's drafter too.
        ("b300 plain nvidia-nvfp4", [speculation("mtp", 1)], "would be read as something else"),
        ("b300 pro pro-nvfp4-fp8-mtp", ["--spec-method=mtp", "--spec-tokens=1"], "stored"),
        ("rtxpro6000 tp4-plain deepseek-v4-flash-0731", [speculation("dspark", 5)], "256 indices"),
        # And so does what a preset may say of its drafter.
        ("b300 plain redhat-nvfp4-fp8", ["-sc", '{"method":"mtp"}'], "has no MTP block"),
        ("b300 dspark deepseek-v4-flash-0731", [speculation("dspark", 7)], "5 tokens, not 7"),
        ("b300 dspark deepseek-v4-flash-0731", [speculation("mtp", 1)], "dspark, not mtp"),
        ("b300 mtp flash-nvfp4-fp8-mtp", [speculation("dspark", 5)], "mtp, not dspark"),
    ],
)
def test_drafter_of_a_user_is_refused_as_a_presets(
    where: str, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sku, preset, artifact = where.split()
    argv = ["serve", "--sku", sku, "--preset", preset, "--artifact", artifact, "--print", "--"]
    assert main([*argv, *flags]) == UnsupportedCellError.exit_code
    out, err = capsys.readouterr()
    assert (out, words in err) == ("", True)


def test_other_k_of_a_user_is_not_a_finding() -> None:
    draft, graphs = ANSWER.draft, ANSWER.cuda_graphs
    assert draft is not None
    assert graphs is not None
    three = ANSWER.model_copy(
        update={
            "draft": draft.model_copy(update={"speculative_tokens": 3}),
            "cuda_graphs": graphs.model_copy(update={"sizes": (32,)}),
        }
    )
    judge._require_clean(deployment(speculation("mtp", 3)), three)
    with pytest.raises(PresetLintError, match=r"the preset drafts 2 tokens, and vLLM 0\.26\.0 3"):
        judge._require_clean(deployment(speculation("mtp", 2)), three)


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs docker and podman that print the file beside them; their arguments are kept."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "docker"
    inputs = "sed -n 's|^--volume=\\(.*\\):/mnt:ro|\\1|p'"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = run ] || exit 0\nprintf "%s\\n" "$0" "$@" > {folder}/arguments\n'
        f"cp -r $({inputs} {folder}/arguments) {folder}/in\ncat {folder}/answer\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (folder / "podman").symlink_to(program)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_image_is_asked_one_question_without_network_and_rights(engine: str, docker: Path) -> None:
    wanted = ANSWER.model_dump(mode="json")
    (docker / "answer").write_text(json.dumps([wanted]))
    asked = deployment("--max-num-seqs=4")
    assert judge.ask(Runner(), asked, "localhost/vllm:x", engine) == ANSWER
    program, *arguments = (docker / "arguments").read_text().splitlines()
    assert Path(program).name == engine
    assert ("--security-opt=label=disable" in arguments) is (engine == "podman")
    assert {"--network=none", "--cap-drop=ALL", "--read-only", "localhost/vllm:x"} <= set(arguments)
    (volume,) = (word for word in arguments if word.endswith(":/cache"))
    assert volume.startswith("--volume=vllm-forge-asked-"), "a server's volume is not its own"
    (question,) = json.loads((docker / "in" / "questions.json").read_text())["questions"]
    assert question["arguments"][-1] == "--max-num-seqs=4"
    assert question["device"]["name"] == MATRIX.sku["rtxpro6000"].device


def test_variable_without_a_value_is_asked_with_the_callers(
    docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docker passes it on: not at all where the caller has none."""
    (docker / "answer").write_text(json.dumps([ANSWER.model_dump(mode="json")]))
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "0")
    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH", raising=False)
    env = ("VLLM_USE_DEEP_GEMM", "VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_CACHE_ROOT=")
    judge.ask(Runner(), deployment(env=env), "localhost/vllm:x", "docker")
    (question,) = json.loads((docker / "in" / "questions.json").read_text())["questions"]
    own = question["environment"].items() - MATRIX.sku["rtxpro6000"].env.items()
    assert dict(own) == {"VLLM_USE_DEEP_GEMM": "0", "VLLM_CACHE_ROOT": ""}


@pytest.mark.parametrize("answer", [None, "no answer\n"])
def test_image_that_does_not_answer_is_undecided(answer: str | None, docker: Path) -> None:
    if answer is not None:
        (docker / "answer").write_text(answer)
    with pytest.raises(NotJudgedError if answer is None else SelectionFailedError):
        judge.ask(Runner(), deployment("--max-num-seqs=4"), "localhost/vllm:x", "docker")


def test_without_engine_nothing_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vllm_forge.host.run.which", lambda _: None)
    argv = ["serve", "--sku=rtxpro6000", "--preset=tp2-mtp", "--print", "--ask"]
    assert main([*argv, "--", "--max-num-seqs=4"]) == NotJudgedError.exit_code
    assert capsys.readouterr().out == ""
    assert main(argv) == 0, "a preset is covered by the record"


def test_findings_of_an_answer_refuse_the_start() -> None:
    """Lint's rules hold for a user's flags as for a preset's."""
    graphs = ANSWER.cuda_graphs
    assert graphs is not None
    engine = ANSWER.engine
    assert engine is not None
    eager = ANSWER.model_copy(update={"engine": engine.model_copy(update={"max_num_seqs": 512})})
    asked = deployment("--max-num-seqs=512")
    with pytest.raises(PresetLintError, match="512 x 2 = 1024"):
        judge._require_clean(asked, eager)
    with pytest.raises(PresetLintError, match="is not divided by --tensor-parallel-size=3"):
        judge._require_clean(deployment("-tp", "3"), ANSWER)
    judge._require_clean(deployment(), ANSWER)


@pytest.mark.parametrize("name", ["a:b", "\x1b[31m", "a\nb"])
def test_model_folder_of_an_odd_name_is_refused(name: str, tmp_path: Path) -> None:
    """An engine cuts a volume at a colon; what a terminal obeys is not printed."""
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="without a colon or a control character"):
        judge.require_model(replace(deployment(), model=tmp_path / name))


def test_model_folder_must_hold_the_artifact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By sizes, names, dtypes and shapes; a folder's name says nothing."""
    folder = layout(tmp_path / "a b", "card")
    argv = ["serve", "--sku=rtxpro6000", "--preset=tp2-mtp", "--print", f"--model={folder}"]
    assert main(argv) == ModelFolderError.exit_code
    err = capsys.readouterr().err
    assert "num_hidden_layers is 3, not 43" in err
    assert f"checkpoint inspect '{folder}'" in err.replace("\n", "")
    tiny = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr("vllm_forge.serve.judge.artifact_config", lambda _: tiny)
    assert main(argv) == 0
    assert f"'--volume={folder}:/model:ro'" in capsys.readouterr().out
    shard = next(folder.glob("*.safetensors"))
    shard.chmod(0o600)  # as under umask 077
    assert main(argv) == ModelFolderError.exit_code
    err = capsys.readouterr().err
    assert "cannot read this" in err and f"chmod -R go+rX '{folder}'" in err
    shard.chmod(0o640)
    red = ModelFolderError.exit_code
    assert main(argv) == (red if shard.stat().st_gid else 0), "the image's user is of group 0"
    folder.chmod(0o744)
    assert main(argv) == ModelFolderError.exit_code
    folder.chmod(0o755)
    blob = shard.rename(tmp_path / "blob")
    shard.symlink_to(blob)  # as in the Hub's cache
    capsys.readouterr()
    assert main(argv) == ModelFolderError.exit_code
    assert "a link out of the folder" in capsys.readouterr().err
    blob.rename(shard)
    assert main([*argv, "--artifact=flash-w4a16-fp8-mtp"]) == ModelFolderError.exit_code
    assert "this is not flash-w4a16-fp8-mtp" in capsys.readouterr().err
    assert main([*argv[:-1], f"--model={tmp_path / 'none'}"]) == 2
