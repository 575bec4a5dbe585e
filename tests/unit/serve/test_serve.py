"""Presets: rows to one command line that a shell takes as it is."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_forge.cli import main
from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host import Reply
from vllm_forge.images.errors import BuildRecordError
from vllm_forge.images.record import keep_digest
from vllm_forge.matrix import Matrix, image_cell, load, serve_arguments
from vllm_forge.matrix.errors import UnsupportedCellError
from vllm_forge.serve.command import (
    Command,
    ServeOptions,
    bare_command,
    become,
    build_command,
    choose_gpus,
    container_command,
    read_key,
    running_engine,
    service_of,
)
from vllm_forge.serve.deployment import Deployment, find_deployment, find_preset, presets_of
from vllm_forge.serve.errors import (
    NoGpuError,
    UnknownArtifactError,
    UnknownPresetError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.serve.command import Engine

ROOT = Path(__file__).parents[3]
DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
def matrix(root: Path) -> Matrix:
    return load(root)


@pytest.fixture
def deployment(matrix: Matrix, root: Path) -> Deployment:
    return find_deployment(matrix, image_cell(matrix, "b300"), "mtp")


def run(
    deployment: Deployment, *, digest: str | None = None, engine: Engine = "docker", **options: Any
) -> Command:
    service = service_of(deployment, ServeOptions(**options), digest=digest)
    return container_command(service, engine=engine)


def words(command: Command) -> list[str]:
    """The command as a shell reads its text, without the environment before it."""
    return [word for word in shlex.split(command.text()) if word != "\n"]


def test_the_issue_names_these_presets(matrix: Matrix) -> None:
    """B300 and B200: TP4, k=2 and without; RTX PRO 6000: TP2 and TP4, k=1, small batches."""
    for sku in ("b300", "b200"):
        rows = {short: matrix.preset[name] for short, name in presets_of(matrix, sku).items()}
        assert {s: (p.tensor_parallel, p.speculative_tokens) for s, p in rows.items()} == {
            "mtp": (4, 2),
            "plain": (4, 0),
        } | ({"dspark": (4, 5), "pro": (8, 0)} if sku == "b300" else {})
    for parallel in (2, 4):
        row = matrix.preset[f"rtxpro6000-tp{parallel}-mtp"]
        assert (row.tensor_parallel, row.speculative_tokens) == (parallel, 1)
        assert {"--max-num-seqs=8", "--max-num-batched-tokens=2048"} <= set(row.flags)
    assert presets_of(matrix, "h200")
    assert matrix.sku["h200"].development


# SKU -> artifacts without a preset, as no text gives the values: V4-Pro is published for 8 x B300
# alone; and nobody published a run of 0731 on a B200. Presets of h200 are what receipts vouch for.
PRO, DSPARK = "pro-nvfp4-fp8-mtp", "deepseek-v4-flash-0731"
WITHOUT = {"b200": {PRO, DSPARK}, "h200": {PRO, DSPARK}, "rtxpro6000": {PRO}}


def test_every_artifact_has_a_preset_on_every_sku(matrix: Matrix) -> None:
    for sku in matrix.sku:
        served = {
            a for name in presets_of(matrix, sku).values() for a in matrix.preset[name].artifacts
        }
        asked = {name for name, row in matrix.artifact.items() if row.unasked is None}
        assert served == asked - WITHOUT.get(sku, set())


def test_an_artifact_with_mtp_can_be_served_with_it(matrix: Matrix) -> None:
    for sku in matrix.sku:
        drafted = {
            artifact
            for name in presets_of(matrix, sku).values()
            if matrix.preset[name].speculative_tokens
            for artifact in matrix.preset[name].artifacts
        }
        assert drafted == {
            name
            for name, row in matrix.artifact.items()
            if row.mtp != "none" and row.unasked is None and name not in WITHOUT.get(sku, ())
            if any(row.why_not(line, sku, drafting=True) is None for line in matrix.line)
        }


def test_arguments_of_a_preset(matrix: Matrix) -> None:
    args, env = serve_arguments(matrix, "b300-mtp")
    assert args == [
        "--tensor-parallel-size=4",
        "--kv-cache-dtype=fp8",
        "--max-num-seqs=128",
        '--speculative-config={"method":"mtp","num_speculative_tokens":2}',
    ]
    assert env == {}
    assert not any("speculative" in arg for arg in serve_arguments(matrix, "b300-plain")[0])


@pytest.mark.parametrize("line", load(ROOT).line)
def test_a_line_adds_its_parsers(line: str, matrix: Matrix) -> None:
    """Case 19: without them a request with tools is refused with status 400."""
    added = serve_arguments(matrix, "b300-mtp", line)[0][-3:]
    assert added == [
        "--enable-auto-tool-choice", "--tool-call-parser=deepseek_v4",
        "--reasoning-parser=deepseek_v4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("own", "left"),
    [
        ("--tool-call-parser=hermes", ["--enable-auto-tool-choice", "--reasoning-parser"]),
        ("--reasoning_parser=deepseek_r1", ["--enable-auto-tool-choice", "--tool-call-parser"]),
        ("--no-enable-auto-tool-choice", ["--tool-call-parser", "--reasoning-parser"]),
    ],
)
def test_a_preset_keeps_its_own_parser(own: str, left: list[str], matrix: Matrix) -> None:
    preset = matrix.preset["b300-plain"].model_copy(update={"flags": (own,)})
    changed = matrix.model_copy(update={"preset": {"b300-plain": preset}})
    args, _ = serve_arguments(changed, "b300-plain", "0.26")
    assert args[1] == own
    assert [arg.partition("=")[0] for arg in args[2:]] == left


def test_b200_has_the_presets_of_b300(matrix: Matrix) -> None:
    for short in ("mtp", "plain"):
        assert serve_arguments(matrix, f"b200-{short}") == serve_arguments(matrix, f"b300-{short}")


def test_no_preset_forces_marlin(matrix: Matrix) -> None:
    assert not any(preset.env.keys() & matrix.retired.keys() for preset in matrix.preset.values())


@pytest.mark.parametrize("asked", ["mtp", "b300-mtp"])
def test_preset_by_short_or_full_name(asked: str, matrix: Matrix) -> None:
    assert find_preset(matrix, "b300", asked) == "b300-mtp"


@pytest.mark.parametrize(
    ("sku", "asked", "words"),
    [
        ("b300", "mpt", "did you mean 'mtp'"),
        ("rtxpro6000", "tp3-mtp", "did you mean 'tp"),
        ("b300", "b200-mtp", "mtp"),
        ("b300", "", "known: dspark, mtp, plain, pro"),
    ],
)
def test_unknown_preset(sku: str, asked: str, words: str, matrix: Matrix) -> None:
    with pytest.raises(UnknownPresetError, match=words):
        find_preset(matrix, sku, asked)


def test_unknown_artifact(matrix: Matrix, root: Path) -> None:
    cell = image_cell(matrix, "b300")
    with pytest.raises(UnknownArtifactError, match="did you mean 'nvidia-nvfp4'"):
        find_deployment(matrix, cell, "mtp", "nvidia-nvfp")
    with pytest.raises(UnknownArtifactError, match="does not serve artifact redhat") as refused:
        find_deployment(matrix, cell, "mtp", "redhat-nvfp4-fp8")
    assert "nvidia-nvfp4" in refused.value.remedy


def test_unserved_artifact_is_rejected_with_the_reason(matrix: Matrix, root: Path) -> None:
    (row,) = matrix.artifact["nvidia-nvfp4"].unserved
    assert row.drafting
    for name in matrix.line:
        cell = image_cell(matrix, "b300", name)
        find_deployment(matrix, cell, "plain", "nvidia-nvfp4").require_served()
        deployment = find_deployment(matrix, cell, "mtp", "nvidia-nvfp4")
        if name not in row.lines:
            deployment.require_served()
            continue
        with pytest.raises(UnsupportedCellError) as refused:
            deployment.require_served()
        for words in (f"line {name}", row.reason, "artifact.nvidia-nvfp4.unserved", "--line"):
            assert words in str(refused.value)


@pytest.mark.parametrize("how", [["--print"], []])
def test_serve_refuses_it_before_anything_else(
    how: list[str], matrix: Matrix, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["serve", "--sku=b300", "--line=0.33", "--preset=plain", "--artifact=redhat-nvfp4-fp8"]
    assert main([*argv, *how]) == UnsupportedCellError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert matrix.artifact["redhat-nvfp4-fp8"].unserved[0].reason in err


def test_docker_command(deployment: Deployment) -> None:
    assert words(run(deployment, digest=DIGEST)) == [
        "docker", "run", "--gpus=4", "--rm", "--name=vllm-b300-mtp", "--init", "--ipc=private",
        "--shm-size=16g",
        "--ulimit=memlock=-1", "--ulimit=stack=67108864", "--publish=8000:8000",
        f"--volume=vllm-forge-{DIGEST[7:19]}:/cache",
        "--volume=vllm-forge-downloads:/cache/huggingface", f"localhost/vllm-0.26.0-b300@{DIGEST}",
        "canada-quant/DeepSeek-V4-Flash-NVFP4-FP8-MTP", "--port=8000",
        "--tensor-parallel-size=4", "--kv-cache-dtype=fp8", "--max-num-seqs=128",
        '--speculative-config={"method":"mtp","num_speculative_tokens":2}',
        "--enable-auto-tool-choice", "--tool-call-parser=deepseek_v4",
        "--reasoning-parser=deepseek_v4",
    ]  # fmt: skip


def test_podman_command_names_the_devices(matrix: Matrix, root: Path) -> None:
    deployment = find_deployment(matrix, image_cell(matrix, "rtxpro6000"), "tp2-mtp")
    argv = words(run(deployment, engine="podman"))
    devices = [word for word in argv if word.startswith("--device=")]
    assert devices == ["--device=nvidia.com/gpu=0", "--device=nvidia.com/gpu=1"]
    assert "localhost/vllm-0.26.0-rtxpro6000:0.26" in argv  # by tag where nothing is built
    assert not any(word.startswith("--gpus") for word in argv)


def test_bare_command_sets_what_the_image_has_set(deployment: Deployment) -> None:
    text = bare_command(deployment).text()
    assert text.startswith(
        "TORCH_CUDA_ARCH_LIST=10.3a vllm serve canada-quant/DeepSeek-V4-Flash-NVFP4-FP8-MTP \\\n"
    )


def test_bare_command_leaves_the_callers_variables_alone(deployment: Deployment) -> None:
    own = replace(deployment, env=("VLLM_USE_DEEP_GEMM", "VLLM_LOGGING_LEVEL=DEBUG"))
    assert bare_command(own).env.keys() - deployment.cell.sku.env.keys() == {"VLLM_LOGGING_LEVEL"}


def test_environment_of_a_preset_goes_into_the_container(
    matrix: Matrix, deployment: Deployment
) -> None:
    row = deployment.preset.model_copy(update={"env": {"VLLM_A": "b c"}})
    rows = {**matrix.preset, deployment.preset_name: row}
    changed = replace(deployment, matrix=matrix.model_copy(update={"preset": rows}))
    assert "--env=VLLM_A=b c" in words(run(changed))
    assert bare_command(changed).env["VLLM_A"] == "b c"


@settings(max_examples=40)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1), max_size=4
    ),
    st.dictionaries(
        st.from_regex(r"[A-Z_]{1,8}", fullmatch=True), st.text("ab '\"$\\`\n"), max_size=2
    ),
)
def test_text_is_what_a_shell_reads_back(options: list[str], env: dict[str, str]) -> None:
    command = Command(argv=("printf", r"%s\0", *options), env=env)
    done = subprocess.run(["bash", "-c", command.text()], capture_output=True, check=True)
    seen = done.stdout.decode().split("\0")[:-1] if options else []
    assert seen == options


class Said:
    """A probe that knows its replies by name."""

    def __init__(self, **replies: Reply) -> None:
        self.replies = replies

    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        del argv
        return self.replies.get(name.replace("-", "_"), Reply(code=127, text=""))


YES = Reply(code=0, text="")


def test_the_engine_that_answers_is_taken() -> None:
    assert running_engine(Said(docker=YES, podman=YES), None) == "docker"
    assert running_engine(Said(podman=YES), None) == "podman"
    assert running_engine(Said(docker=YES, podman=YES), "podman") == "podman"
    with pytest.raises(NoGpuError, match="docker and podman"):
        running_engine(Said(docker=Reply(code=1, text="no daemon")), None)


def listing(*names: str) -> Reply:
    """What nvidia-smi says of GPUs: "b300" or the name of another one."""
    rows = [
        f"{index}, NVIDIA B300 SXM6 AC, 10.3, 595.58.03, 275040, Disabled, Completed, Success"
        if name == "b300"
        else f"{index}, {name}, 8.9, 595.58.03, 24564, Disabled, N/A, N/A"
        for index, name in enumerate(names)
    ]
    return Reply(code=0, text="\n".join(rows) + "\n")


@pytest.mark.parametrize("count", [0, 3, 4, 8])
def test_as_many_gpus_as_the_preset_needs(count: int, deployment: Deployment) -> None:
    probe = Said(nvidia_smi=listing(*["b300"] * count))
    if count >= 4:
        assert choose_gpus(probe, deployment, 1) == ()
        return
    with pytest.raises(NoGpuError, match="needs 4 GPUs") as refused:
        choose_gpus(probe, deployment, 1)
    assert "nox -s doctor -- --sku b300" in refused.value.remedy


def test_gpus_are_pinned_where_the_first_ones_do_not_fit(deployment: Deployment) -> None:
    """Docker takes the first ones that there are, fitting or not."""
    probe = Said(nvidia_smi=listing("GeForce RTX 4090", *["b300"] * 8))
    assert choose_gpus(probe, deployment, 1) == ("1", "2", "3", "4")
    assert choose_gpus(probe, deployment, 2) == ("5", "6", "7", "8")
    with pytest.raises(NoGpuError, match="needs 12 GPUs of compute capability"):
        choose_gpus(probe, deployment, 3)


def test_print_pins_gpus_on_a_mixed_host_and_needs_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["serve", "--sku=b300", "--preset=mtp", "--print"]
    for names, wanted in (
        (["GeForce RTX 4090", *["b300"] * 4], "'--gpus=\"device=1,2,3,4\"'"),
        (["b300"] * 8, "--gpus=4"),
        (["GeForce RTX 4090"], "--gpus=4"),  # for another host
    ):
        probe = Said(nvidia_smi=listing(*names))
        monkeypatch.setattr("vllm_forge.commands.serve.HostProbe", lambda probe=probe: probe)
        assert main(argv) == 0
        assert f"\n    {wanted} \\\n" in capsys.readouterr().out


def test_failed_gpu_listing_counts_as_no_gpu(deployment: Deployment) -> None:
    failed = Reply(code=10, text=listing(*["b300"] * 4).text)
    with pytest.raises(NoGpuError, match="has none"):
        choose_gpus(Said(nvidia_smi=failed), deployment, 1)


def test_parallel_sizes_decide_the_gpus(deployment: Deployment) -> None:
    """One GPU a rank of data parallelism, https://github.com/vllm-project/vllm/issues/51454."""
    flags = ("--tensor-parallel-size=1", "--data-parallel-size=4", "--enable-expert-parallel")
    argv = words(run(replace(deployment, flags=flags)))
    assert "--gpus=4" in argv
    assert argv[-3:] == list(flags)
    eight = replace(deployment, flags=("-dp", "2"))
    assert "--gpus=8" in words(run(eight))
    with pytest.raises(NoGpuError, match="needs 8 GPUs"):
        choose_gpus(Said(nvidia_smi=listing(*["b300"] * 4)), eight, 1)


def test_second_replica_has_other_gpus_port_and_name(deployment: Deployment) -> None:
    one, two = (words(run(deployment, digest=DIGEST, replica=number)) for number in (1, 2))
    assert {"--gpus=4", "--publish=8000:8000", "--name=vllm-b300-mtp"} <= set(one)
    changed = {'--gpus="device=4,5,6,7"', "--publish=8001:8000", "--name=vllm-b300-mtp-2"}
    assert set(two) - set(one) == changed, "and the volumes are the same"
    assert "--publish=9002:8000" in words(run(deployment, port=9001, replica=2))
    podman = words(run(deployment, engine="podman", replica=2))
    devices = [word[-1] for word in podman if word.startswith("--device=nvidia.com/gpu=")]
    assert devices == ["4", "5", "6", "7"]


def test_gpu_that_is_split_is_not_taken(deployment: Deployment) -> None:
    rows = listing(*["b300"] * 8)
    said = replace(rows, text=rows.text.replace("Disabled", "Enabled", 1))
    assert choose_gpus(Said(nvidia_smi=said), deployment, 1) == ("1", "2", "3", "4")
    with pytest.raises(NoGpuError, match="without MIG, this host has 7"):
        choose_gpus(Said(nvidia_smi=said), deployment, 2)


def test_given_gpus_are_pinned_and_counted(deployment: Deployment) -> None:
    assert '--gpus="device=0,2,4,6"' in words(run(deployment, gpu_ids=("0", "2", "4", "6")))
    with pytest.raises(UsageError, match="2 GPUs are given, and b300-mtp needs 4"):
        run(deployment, gpu_ids=("0", "2"))


def test_options_of_the_container(deployment: Deployment, tmp_path: Path) -> None:
    changed = replace(deployment, env=("HF_TOKEN", "NCCL_DEBUG=INFO"), model=tmp_path)
    key = tmp_path / "a key"
    command = run(changed, port=9000, image="registry.example/vllm@" + DIGEST, name="blue",
                  key=key, detach=True)  # fmt: skip
    argv = words(command)
    assert argv[:5] == [f"VLLM_API_KEY=$(cat '{key}')", "&&", "export",
                        "VLLM_API_KEY=${VLLM_API_KEY:?empty}", "&&"]  # fmt: skip
    assert "--rm" not in argv
    wanted = {
        "--detach", "--restart=unless-stopped", "--name=blue", "--publish=9000:8000",
        "--env=HF_TOKEN", "--env=NCCL_DEBUG=INFO", "--env=VLLM_API_KEY",
        f"--volume={tmp_path}:/model:ro",
    }  # fmt: skip
    assert wanted <= set(argv)
    image = argv.index("registry.example/vllm@" + DIGEST)
    name = "--served-model-name=canada-quant/DeepSeek-V4-Flash-NVFP4-FP8-MTP"
    assert argv[image + 1 : image + 4] == ["/model", name, "--port=8000"]
    mine = replace(changed, flags=("--served-model-name", "deepseek-v4"))
    assert name not in words(run(mine))


def test_an_image_of_ones_own_has_its_own_volume_of_code(deployment: Deployment) -> None:
    """Else it would run what another image compiled."""
    images = (None, "a/b:1", "a/b:2", "a/b@sha256:" + "12" * 32, "c/d@sha256:" + "34" * 32)
    volumes = [run(deployment, image=image).argv for image in images]
    code = {word for argv in volumes for word in argv if word.endswith(":/cache")}
    assert len(code) == len(images)
    assert "--volume=vllm-forge-121212121212:/cache" in code


def test_podman_has_the_health_check_of_the_image(deployment: Deployment, root: Path) -> None:
    """It ignores that of an OCI image; the command and times are those of docker/Dockerfile."""
    argv = words(run(deployment, engine="podman"))
    assert "--health-cmd=python -I /opt/vllm-forge/health.py" in argv
    dockerfile = (root / "docker" / "Dockerfile").read_text()
    assert '["python", "-I", "/opt/vllm-forge/health.py"]' in dockerfile
    for name, value in (("interval", "30s"), ("timeout", "5s"), ("start-period", "30m")):
        assert f"--health-{name}={value}" in argv
        assert f"--{name}={value}" in dockerfile
    assert not any("health" in word for word in words(run(deployment)))


def test_api_key_goes_through_the_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"
    path.write_text("s3cret\n")
    became: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr("vllm_forge.serve.command.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("os.execve", lambda _, argv, env: became.append((argv, env)))
    become(Command(argv=("docker", "run", "--env=VLLM_API_KEY"), secrets={"VLLM_API_KEY": path}))
    ((argv, env),) = became
    assert env["VLLM_API_KEY"] == "s3cret"
    assert not any("s3cret" in word for word in argv)
    for content in ("", "\n", "two words", "a\x1b[2Jb", "x" * 5000, "a\nb"):
        path.write_text(content)
        with pytest.raises(ForgeError, match="key"):
            read_key(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port=65536"], "invalid --port: expected"),
        (["--replica=0"], "--replica"), (["--name=-x"], "--name"), (["--image=-v"], "--image"),
        (["--gpu-ids=0,,1"], "--gpu-ids"), (["--env=A B"], "--env"), (["--env==x"], "--env"),
        (["--env=VLLM_API_KEY=s3cret"], "--api-key-file"),
        (["--env=HF_TOKEN=s3cret"], "leave its value out"),
        (["--", "--hf-token=s3cret"], "--env HF_TOKEN before --"),
        (["--", "--port=1"], "--port after --"),
        (["--name=a b"], "invalid --name: expected letters"),
        (["--port=0"], "invalid --port: expected 1 to 65535"),
        (["--gpu-ids=0,one"], "invalid --gpu-ids: expected numbers"),
        (["--env=A B=c"], "invalid --env: expected NAME"),
        (["--image=docker://a b"], "invalid --image: expected HOST/NAME"),
        (["--gpu-ids=0,1,1,2"], "invalid --gpu"), (["--", "--host=127.0.0.1"], "--host after --"),
        (["--env=CUDA_VISIBLE_DEVICES=4"], "invalid --env CUDA_VISIBLE_DEVICES: choose"),
        (["--env=NVIDIA_VISIBLE_DEVICES"], "choose GPUs by --gpu-ids"),
        (["--print", "--k8s"], "not allowed with"),
        (["--api-key-file=\x1b[31mx"], "invalid --api-key-file: expected a path without control"),
        (["--api-key-file=a\nb"], "invalid --api-key-file"),
        (["--port=65535", "--replica=2"], "replica 2 has no port: 65536 is above 65535"),
        (["--", "--served-model-name=\x1b[31mx"], r"in '--served-model-name=\x1b[31mx' after --"),
    ],
)  # fmt: skip
def test_invalid_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--sku=b300", "--preset=mtp", "--print", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, message in err) == ("", True)
    assert "s3cret" not in err


def test_doctor_refuses_what_no_host_serves(capsys: pytest.CaptureFixture[str]) -> None:
    """As serve: no host is fit for what the line does not serve."""
    argv = ["doctor", "--sku=rtxpro6000", "--replay=tests/fixtures/doctor/rtxpro6000"]
    assert main([*argv, "--preset=tp4-dspark", "--line=0.26"]) == UnsupportedCellError.exit_code
    out, err = capsys.readouterr()
    assert (out, "vllm-project/vllm#50720" in err) == ("", True)
    assert main([*argv, "--preset=tp4-dspark", "--line=0.33"]) == 0


def test_flags_of_vllm_are_for_serve_and_doctor_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--sku=b300", "--", "--max-model-len=1"]) == 2
    assert "--max-model-len" in capsys.readouterr().err
    argv = ["doctor", "--sku=rtxpro6000", "--preset=tp2-mtp", "--json",
            "--replay=tests/fixtures/doctor/rtxpro6000"]  # fmt: skip
    for flags, level in (((), "unknown"), (("--", "--gpu-memory-utilization=0.85"), "red")):
        main([*argv, *flags])
        rows = json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]
        assert [row["level"] for row in rows if row["check"] == "GPU memory"] == [level]


def test_print_has_only_the_command_on_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "--sku=b300", "--preset=mtp", "--line=0.33", "--print"]) == 0
    out, err = capsys.readouterr()
    assert shlex.split(out)[0] == "docker"
    assert "vllm-0.33.0-b300" in out
    assert "not run" in err
    assert "TORCH_CUDA_ARCH_LIST=10.3a vllm serve" in err
    assert "a chat thinks unless a request has" in err
    assert "vllm/tokenizers/deepseek_v4.py:31" in err
    assert "undecided here: vllm-project/vllm#46796" in err


PRINT = ["serve", "--sku=b300", "--preset=mtp", "--line=0.26", "--print"]


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("NCCL_P2P_DISBALE=1", "unknown variable NCCL_P2P_DISBALE (did you mean"),
        ("NCCL_P2P_DISABLE=1", ""),
    ],
)
def test_doubtful_variable_is_said(
    variable: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PRINT, f"--env={variable}"]) == 0
    err = capsys.readouterr().err
    assert words in err
    assert ("unknown variable" in err) == bool(words)


def test_print_shows_how_to_build_a_missing_image(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matrix.toml", "patches/vllm/dispositions.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((root / name).read_text())
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(tmp_path))
    argv = ["serve", "--sku=b300", "--preset=mtp", "--line=0.26", "--print"]
    assert main(argv) == 0
    assert "nox -s build-sm103a -- --line 0.26 --load" in capsys.readouterr().err
    (tmp_path / "dist").mkdir()
    record = tmp_path / "dist" / "vllm-0.26.0-b300.json"
    built = {"digest": DIGEST, "inputs": {}, "blobs": {}, "engine": "docker"}
    record.write_text(json.dumps(built))
    keep_digest(record, {}, DIGEST)
    assert main(argv) == 0
    assert f"localhost/vllm-0.26.0-b300@{DIGEST}" in capsys.readouterr().out
    record.write_text("{")
    assert main(argv) == BuildRecordError.exit_code


def test_serving_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_forge.commands.serve.HostProbe", lambda: Said(docker=YES))
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("it was run"))
    assert main(["serve", "--sku=b300", "--preset=mtp"]) == NoGpuError.exit_code


def test_serving_becomes_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its signals and its exit code are those of docker: the process is replaced."""
    probe = Said(docker=YES, nvidia_smi=listing(*["b300"] * 4))
    monkeypatch.setattr("vllm_forge.commands.serve.HostProbe", lambda: probe)
    monkeypatch.setattr("vllm_forge.serve.command.which", lambda name: f"/bin/{name}")
    became: list[tuple[str, list[str]]] = []
    monkeypatch.setattr("os.execve", lambda path, argv, env: became.append((path, argv)))
    assert main(["serve", "--sku=b300", "--preset=plain", "--artifact=redhat-nvfp4-fp8"]) == 0
    ((path, argv),) = became
    assert path == "/bin/docker"
    assert argv[:4] == ["docker", "run", "--gpus=4", "--rm"]
    assert "RedHatAI/DeepSeek-V4-Flash-NVFP4-FP8" in argv


def test_build_command_is_a_session(matrix: Matrix, root: Path) -> None:
    cell = image_cell(matrix, "b300", "0.22")
    assert build_command(matrix, cell) == "nox -s build-sm103a -- --line 0.22 --load"
    twin = matrix.model_copy(update={"sku": matrix.sku | {"twin": matrix.sku["b300"]}})
    assert build_command(twin, cell) == "nox -s build-b300 -- --line 0.22 --load"
