"""Hosts as their own tools described them, and what the doctor says of each."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from vllm_forge.cli import main
from vllm_forge.host import HostProbe, RecordedProbe, RecordingProbe, Reply
from vllm_forge.host.probe import GPU_QUERY
from vllm_forge.serve import doctor as checks
from vllm_forge.serve.doctor import (
    CHECKS,
    USED_QUERY,
    ask_host,
    listed_gpus,
    parse_meminfo,
    parse_versions,
)
from vllm_forge.serve.machine import QUESTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from vllm_forge.serve.machine import HostFinding

    Diagnose = Callable[..., list[HostFinding]]


def levels(findings: list[HostFinding]) -> dict[str, str]:
    return {finding.check: finding.level for finding in findings}


def test_a_good_host_is_green(recorded: Callable[..., Path], diagnose: Diagnose) -> None:
    findings = diagnose(recorded("b300"), "b300")
    assert set(levels(findings).values()) == {"ok"}
    assert {"GPU count", "driver", "NVLink fabric", "disk", "/dev/shm"} <= set(levels(findings))


def test_a_host_without_gpu_says_what_is_missing(
    recorded: Callable[..., Path], diagnose: Diagnose
) -> None:
    findings = diagnose(recorded("no-gpu"), "b300")
    red = {finding.check: finding for finding in findings if finding.level == "red"}
    assert set(red) == {"GPU", "container engine", "container toolkit", "disk"}
    assert "nvidia-smi is not installed" in red["GPU"].seen
    assert "580.65.06" in red["GPU"].remedy
    assert "10.3" in red["GPU"].needed


def test_every_trouble_is_found_and_has_a_remedy(
    recorded: Callable[..., Path], diagnose: Diagnose
) -> None:
    findings = diagnose(recorded("rtx-troubled"), "rtxpro6000", "tp2-mtp")
    found = levels(findings)
    assert {check for check, level in found.items() if level == "red"} == {
        "GPU count", "MIG", "driver", "mixed drivers", "container engine", "disk", "RAM",
        "/dev/shm",
    }  # fmt: skip
    assert found["device"] == "unknown"  # same capability, another product
    assert all(finding.remedy for finding in findings if finding.level == "red")


# A good host with one thing changed: the check that turns, and words of its remedy.
B300 = "0, NVIDIA B300 SXM6 AC, 10.3, 595.58.03, 275040, Disabled, Completed, Success\n"
ONE_FAULT: dict[str, tuple[dict[str, str | None], str, str]] = {
    "too few GPUs": ({"nvidia_smi": B300}, "GPU count", "more GPUs"),
    "another GPU": (
        {"nvidia_smi": B300.replace("B300 SXM6 AC, 10.3", "B200, 10.0") * 8},
        "compute capability",
        "--sku b200",
    ),
    "a GPU of no SKU": (
        {"nvidia_smi": B300.replace("B300 SXM6 AC, 10.3", "A100, 8.0") * 8},
        "compute capability",
        "no image of this project",
    ),
    "little memory": (
        {"nvidia_smi": B300.replace("275040", "40000") * 8},
        "GPU memory",
        "more GPUs",
    ),
    "old driver": (
        {"nvidia_smi": B300.replace("595.58.03", "580.65.05") * 8, "nvidia_smi_version": None},
        "driver",
        "branch 580",
    ),
    "mixed drivers": (
        {"nvidia_smi": B300 * 8 + B300.replace("595.58.03", "580.95.05")},
        "mixed drivers",
        "one driver release",
    ),
    "split": ({"nvidia_smi": B300.replace("Disabled", "Enabled") * 8}, "MIG", "nvidia-smi -mig 0"),
    "fabric": (
        {"nvidia_smi": B300.replace("Completed, Success", "Completed, Insufficient Resources") * 8},
        "NVLink fabric",
        "nvidia-fabricmanager",
    ),
    "no toolkit": (
        {"nvidia_ctk": None, "docker": '{"ServerVersion": "28", "DockerRootDir": "/d"}'},
        "container toolkit",
        "install nvidia-container-toolkit",
    ),
    "docker not set up": (
        {"docker": '{"ServerVersion": "28", "DockerRootDir": "/d", "Runtimes": {"runc": {}}}'},
        "container engine",
        "nvidia-ctk runtime configure",
    ),
    "no engine": ({"docker": None}, "container engine", "install one of them"),
    "full disk": (
        {"df": "Mounted on 1B-blocks Avail\n/data 200000000000 180000000000\n"},
        "disk",
        "larger disk",
    ),
    "df does not answer": ({"df": None}, "disk", "readable"),
    "little RAM": ({"meminfo": "MemTotal:       4000000 kB\n"}, "RAM", "more RAM"),
    "no meminfo": ({"meminfo": None}, "RAM", "readable"),
}


@pytest.mark.parametrize("fault", ONE_FAULT)
def test_one_fault_turns_one_check_red(
    fault: str, recorded: Callable[..., Path], diagnose: Diagnose
) -> None:
    replies, check, words = ONE_FAULT[fault]
    red = [f for f in diagnose(recorded("b300", **replies), "b300") if f.level == "red"]
    assert check in {finding.check for finding in red}
    assert len({finding.check for finding in red}) <= (2 if fault in {"no toolkit"} else 1)
    assert any(words in finding.remedy for finding in red)


def test_floor_of_the_driver_itself_is_enough(
    recorded: Callable[..., Path], diagnose: Diagnose
) -> None:
    replies = {"nvidia_smi": B300.replace("595.58.03", "580.65.06") * 8, "nvidia_smi_version": None}
    assert levels(diagnose(recorded("b300", **replies), "b300"))["driver"] == "ok"


def test_driver_that_was_upgraded_without_a_reboot(
    recorded: Callable[..., Path], diagnose: Diagnose
) -> None:
    findings = diagnose(recorded("driver-mismatch"), "b300")
    assert levels(findings)["mixed drivers"] == "red"
    assert levels(findings)["GPU"] == "red"
    (engine,) = [finding for finding in findings if finding.check == "container engine"]
    assert "Cannot connect to the Docker daemon" in engine.seen
    assert "start docker" in engine.remedy


def test_stopped_docker_is_reported_without_its_json(
    recorded: Callable[..., Path], diagnose: Diagnose
) -> None:
    """docker 28.2.2 without a daemon: exit 1, JSON of its client, and then the reason."""
    reason = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock."
    folder = recorded("b300", docker=f'{{"ID":"","ClientInfo":{{"Version":"28.2.2"}}}}\n{reason}\n')
    (folder / "docker.code").write_text("1")
    (engine,) = [item for item in diagnose(folder, "b300") if item.check == "container engine"]
    assert engine.seen == f"docker: {reason}"


@pytest.mark.parametrize("reply", ["{", "[]", "WARNING: no daemon"])
def test_an_engine_reply_that_is_not_json_is_shown(
    recorded: Callable[..., Path], diagnose: Diagnose, reply: str
) -> None:
    findings = diagnose(recorded("b300", docker=reply), "b300")
    (engine,) = [finding for finding in findings if finding.check == "container engine"]
    assert (engine.level, reply in engine.seen) == ("red", True)


def test_podman_needs_names_of_the_device_interface(
    recorded: Callable[..., Path], diagnose: Diagnose
) -> None:
    found = diagnose(recorded("b200-podman"), "b200")
    assert levels(found)["container engine"] == "ok"
    assert [f.check for f in found if f.level == "red"] == ["NVLink fabric"]
    found = diagnose(recorded("b200-podman", nvidia_ctk_cdi="\n"), "b200")
    (engine,) = [f for f in found if f.check == "container engine"]
    assert (engine.level, "cdi generate" in engine.remedy) == ("red", True)


def test_a_container_has_its_own_shared_memory(
    recorded: Callable[..., Path], diagnose: Diagnose
) -> None:
    small = "Mounted on 1B-blocks Avail\n/dev/shm 67108864 67108864\n"
    found = diagnose(recorded("b300", df_shm=small), "b300")
    assert levels(found)["/dev/shm"] == "unknown"


def test_size_of_an_artifact_is_that_of_its_manifest(
    recorded: Callable[..., Path], diagnose: Diagnose
) -> None:
    found = diagnose(recorded("b300"), "b300", "plain", "redhat-nvfp4-fp8")
    assert levels(found)["GPU memory"] == levels(found)["RAM"] == "ok"
    (disk,) = [f for f in found if f.check == "disk"]
    assert "178.4 GB for image and weights" in disk.needed


@pytest.mark.parametrize(("split", "level"), [(4, "ok"), (5, "red")])
def test_split_gpus_beside_enough_others_are_fine(
    split: int, level: str, recorded: Callable[..., Path], diagnose: Diagnose
) -> None:
    rows = B300.replace("Disabled", "Enabled") * split + B300 * (8 - split)
    assert levels(diagnose(recorded("b300", nvidia_smi=rows), "b300"))["MIG"] == level


def test_memory_that_others_use_is_red(recorded: Callable[..., Path], diagnose: Diagnose) -> None:
    """As vLLM refuses it: free memory below --gpu-memory-utilization (v1/worker/utils.py)."""
    used = "".join(f"{index}, {60000 if index < 5 else 4}\n" for index in range(8))
    (busy,) = [f for f in diagnose(recorded("b300", nvidia_smi_used=used), "b300")
               if f.check == "GPU memory in use"]  # fmt: skip
    assert busy.level == "red"
    assert "GPU 4 62.9 GB" in busy.seen
    enough = used.replace("4, 60000", "4, 4")  # four others are free
    assert "GPU memory in use" not in levels(
        diagnose(recorded("b300", nvidia_smi_used=enough), "b300")
    )


def test_nvidia_smi_errors_are_shown() -> None:
    lost = (
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure "
        "that the latest NVIDIA driver is installed and running.\n\n"
    )
    assert listed_gpus(Reply(code=9, text=lost))[1].startswith("NVIDIA-SMI has failed")
    assert listed_gpus(Reply(code=6, text="No devices were found\n")) == (
        (),
        "No devices were found",
    )
    old = 'Field "fabric.state" is not a valid field to query.\n\n'
    assert "not a valid field" in listed_gpus(Reply(code=2, text=old))[1]
    assert listed_gpus(Reply(code=0, text="")) == ((), "exit 0 without a word")
    assert parse_versions(Reply(code=9, text=lost)) == {}
    assert parse_meminfo(Reply(code=0, text="MemTotal:  131981020 kB\n")) == 131981020 * 1024


def test_questions_change_nothing() -> None:
    """Every command that is asked only reads."""
    asked: list[list[str]] = []

    class Listener:
        def ask(self, name: str, argv: Sequence[str]) -> Reply:
            del name
            asked.append(list(argv))
            return Reply(code=127, text="")

    ask_host(Listener())
    programs = {tuple(argv[:2]) if argv[0] != "df" else ("df",) for argv in asked}
    assert programs == {
        GPU_QUERY[:2], USED_QUERY[:2], ("nvidia-smi", "--version"), ("nvidia-ctk", "--version"),
        ("nvidia-ctk", "cdi"),
        ("docker", "info"), ("podman", "info"), ("df",), ("cat", "/proc/meminfo"),
        *(tuple(argv[:2]) for argv in QUESTIONS.values()),
    }  # fmt: skip


def test_a_recording_gives_the_same_report(tmp_path: Path) -> None:
    live = ask_host(RecordingProbe(HostProbe(), tmp_path))
    assert ask_host(RecordedProbe(tmp_path)) == live


def test_a_hanging_tool_does_not_hang_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_forge.host.probe.TIMEOUT_S", 0.05)
    reply = HostProbe().ask("sleep", ["sleep", "60"])
    assert (reply.code, "no answer" in reply.text) == (124, True)


def test_a_tool_that_cannot_be_killed_does_not_hang_the_doctor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As nvidia-smi, waiting in the kernel for a GPU that fell off the bus."""
    left: list[subprocess.Popen[str]] = []
    monkeypatch.setattr("vllm_forge.host.probe.TIMEOUT_S", 0.05)
    monkeypatch.setattr("vllm_forge.host.probe.KILLED_S", 0.05)

    def kill(process: subprocess.Popen[str]) -> None:
        left.append(process)

    monkeypatch.setattr(subprocess.Popen, "kill", kill)
    try:
        assert HostProbe().ask("sleep", ["sleep", "20"]).code == 124
        assert left[0].poll() is None
    finally:
        for process in left:
            process.send_signal(signal.SIGKILL)
            process.wait()


def test_a_tool_that_cannot_start_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image has an empty nvidia-smi, onto which an engine mounts the host's."""
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    gpus, error = listed_gpus(HostProbe().ask("nvidia-smi", GPU_QUERY))
    assert (gpus, error) == ((), f"{tmp_path}/nvidia-smi: Exec format error")


@pytest.mark.parametrize(("name", "code"), [("b300", 0), ("no-gpu", 81), ("driver-mismatch", 81)])
def test_exit_code(name: str, code: int, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "tests" / "fixtures" / "doctor" / name
    argv = ["doctor", "--sku=b300", f"--replay={folder}"]
    assert main(argv) == code
    assert main([*argv, "--json"]) == code
    out = capsys.readouterr().out
    findings = json.loads(out[out.index("\n[\n") :])
    assert {finding["level"] for finding in findings} <= {"ok", "unknown", "red"}


def test_open_issue_is_said_and_does_not_fail(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = root / "tests" / "fixtures" / "doctor" / "b300"
    assert main(["doctor", "--sku=b300", f"--replay={folder}", "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out) if row["check"] == "open issue"]
    assert [row["level"] for row in rows] == ["unknown"]
    assert "vllm-project/vllm#46796" in rows[0]["seen"]
    assert "would settle it" in rows[0]["needed"]


def test_every_check_is_in_the_list() -> None:
    named = {value for name, value in vars(checks).items() if name.startswith("check_")}
    assert named == set(CHECKS)
