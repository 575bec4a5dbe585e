"""The machine below the GPUs: what its tools print, and what the doctor says of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_forge.host import HostProbe, Reply, printable
from vllm_forge.host.probe import TIMED_OUT
from vllm_forge.matrix import image_cell, load
from vllm_forge.serve.deployment import Deployment, Needs, find_deployment, needs_of
from vllm_forge.serve.doctor import ask_host, judge, page
from vllm_forge.serve.machine import QUESTIONS, link_kinds
from vllm_forge.sources import read_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_forge.serve.machine import HostFinding

    Diagnose = Callable[..., list[HostFinding]]
    Recorded = Callable[..., Path]

PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n"
)
PEERS = " \tGPU0\tGPU1\t\n GPU0\tX\t{0}\t\n GPU1\t{0}\tX\t\n"
TRANSLATES = "/sys/kernel/iommu_groups/0/type:identity\n/sys/kernel/iommu_groups/7/type:DMA-FQ\n"
ACS = "\t\tACSCtl:\tSrcValid+ TransBlk- ReqRedir+ CmpltRedir+ UpstreamFwd+ EgressCtrl-\n"
LOST = "Unable to determine the device handle for GPU0000:BA:00.0: Unknown Error\n"
ROW = "{}, NVIDIA RTX PRO 6000 Blackwell Server Edition, 12.0, 595.58.03, {}, Disabled, N/A, N/A\n"
# A good host with one thing changed: the check that turns, its level, words of seen and remedy.
FAULTS: dict[str, tuple[dict[str, str | None], str, str, str, str]] = {
    "arm": ({"uname": "aarch64\n"}, "processor", "red", "aarch64", "x86_64 processor"),
    "proprietary": (
        {"nvidia_module": PROPRIETARY}, "kernel modules", "red", "x86_64 Kernel Module",
        "nvidia-open",
    ),
    "ECC": (
        {"nvidia_smi_health": "0, 0, No, None\n1, 3, No, None\n"}, "GPU health", "red",
        "GPU 1: ecc.errors.uncorrected.volatile.total is 3", "--gpu-reset",
    ),
    "reset": (
        {"nvidia_smi_health": "0, 0, [N/A], Drain and Reset\n"}, "GPU health", "red",
        "gpu_recovery_action is Drain and Reset", "reboot",
    ),
    "error in a row": (
        {"nvidia_smi": ROW.format(0, 97887) + ROW.format(1, "[Unknown Error]")}, "GPU health",
        "red", "GPU 1: memory.total is [Unknown Error]", "xid",
    ),
    "lost": ({"nvidia_smi": LOST}, "GPU health", "red", "device handle", "reboot"),
    "lost beside others": (
        {"nvidia_smi": ROW.format(0, 97887) + LOST + ROW.format(1, 97887)}, "GPU health", "red",
        "device handle", "reboot",
    ),
    "lost among health": (
        {"nvidia_smi_health": "0, 0, [N/A], None\n1, 0, [N/A], None\n" + LOST}, "GPU health",
        "red", "device handle", "reboot",
    ),
    "old driver": (
        {"nvidia_smi_health": 'Field "gpu_recovery_action" is not a valid field to query.\n'},
        "GPU health", "unknown", "not a valid field", "",
    ),
    "no peers": (
        {"nvidia_smi_p2p": PEERS.format("GNS"), "iommu": TRANSLATES}, "GPU links", "ok",
        "peer access: GNS", "",
    ),
    "IOMMU": ({"iommu": TRANSLATES}, "IOMMU", "red", "translates: DMA-FQ", "iommu=pt"),
    "ACS": ({"pci_bridges": ACS}, "PCIe ACS", "unknown", "on for 1 of 1", "setpci"),
    "ACS, not root": (
        {"pci_bridges": "\tCapabilities: <access denied>\n"}, "PCIe ACS", "unknown", "root", "",
    ),
    "CDI mode": (
        {"nvidia_runtime": '[nvidia-container-runtime]\nmode = "cdi"\n'}, "container toolkit mode",
        "red", "cdi", "mode=auto",
    ),
    "no links": ({"nvidia_char": ""}, "device links", "unknown", "0", "create-dev-char-symlinks"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_machine_is_found_with_its_remedy(
    fault: str, recorded: Recorded, diagnose: Diagnose
) -> None:
    replies, check, level, seen, remedy = FAULTS[fault]
    found = diagnose(recorded("rtxpro6000", **replies), "rtxpro6000", "tp2-mtp")
    (finding,) = [finding for finding in found if finding.check == check]
    assert (finding.level, seen in finding.seen, remedy in finding.remedy) == (level, True, True)
    others = {f.check for f in found if f.level == "red"} - {check}
    assert others <= ({"GPU"} if fault == "lost" else set())


def test_good_host_without_nvlink_is_green(recorded: Recorded, diagnose: Diagnose) -> None:
    found = diagnose(recorded("rtxpro6000"), "rtxpro6000", "tp4-mtp")
    assert {finding.level for finding in found} == {"ok"}
    assert {"IOMMU", "PCIe ACS", "GPU links"} <= {finding.check for finding in found}


def test_nvlink_makes_the_iommu_irrelevant(recorded: Recorded, diagnose: Diagnose) -> None:
    assert "DMA-FQ" in (recorded("b300") / "iommu.txt").read_text()
    found = diagnose(recorded("b300"), "b300")
    (links,) = [finding for finding in found if finding.check == "GPU links"]
    assert (links.level, "NVLink (NV18)" in links.seen) == ("ok", True)
    assert not {"IOMMU", "PCIe ACS"} & {finding.check for finding in found}


def test_recording_without_the_new_files_does_not_fail(
    recorded: Recorded, diagnose: Diagnose
) -> None:
    folder = recorded("rtxpro6000", **dict.fromkeys(("uname", "nvidia_module", "iommu")))
    found = {f.check: f for f in diagnose(folder, "rtxpro6000", "tp2-mtp")}
    for check in ("processor", "kernel modules", "IOMMU"):
        assert (found[check].level, found[check].seen) == ("unknown", "not recorded")
    folder = recorded("rtxpro6000", nvidia_smi_topo=None)
    found = {f.check: f for f in diagnose(folder, "rtxpro6000", "tp2-mtp")}
    assert (found["GPU links"].level, "not recorded" in found["GPU links"].seen) == (
        "unknown",
        True,
    )


@pytest.mark.parametrize(
    ("silent", "seen"),
    [
        (("own-name",), "no answer: own name"),
        (("name-server",), "no answer: name server"),
        (("own-name", "name-server"), "no answer: own name, name server"),
    ],
)
def test_silent_name_server_is_found_and_does_not_fail(
    silent: tuple[str, ...], seen: str, recorded: Recorded, diagnose: Diagnose
) -> None:
    """Where packets to a name server are lost, each lookup of c10d and Gloo takes 10 s."""
    folder = recorded("b300")
    for name in silent:
        (folder / f"{name}.code").write_text("124\n")
    (found,) = [finding for finding in diagnose(folder, "b300") if finding.level != "ok"]
    assert (found.check, found.level, found.seen) == ("host names", "unknown", seen)
    assert "RES_OPTIONS=timeout:1 attempts:1" in found.remedy


def test_lookups_of_names_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is run below timeout(1), whose exit code says that there was no answer."""
    for name in ("own-name", "name-server"):
        assert QUESTIONS[name][:3] == ("timeout", "2", "getent")
    (tmp_path / "getent").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "getent").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert HostProbe().ask("own-name", ["timeout", "0.01", "getent"]).code == TIMED_OUT


def test_iommu_that_is_off_has_no_groups(recorded: Recorded, diagnose: Diagnose) -> None:
    folder = recorded("rtxpro6000", iommu="")
    (folder / "iommu.code").write_text("1\n")  # as grep ends that found nothing
    (finding,) = [
        f for f in diagnose(folder, "rtxpro6000", "tp2-mtp") if f.check == "IOMMU"
    ]  # fmt: skip
    assert (finding.level, finding.seen) == ("ok", "off")


def test_matrix_of_links_is_read_with_and_without_underlines(root: Path) -> None:
    text = (root / "tests/fixtures/doctor/rtxpro6000/nvidia-smi-topo.txt").read_text()
    assert link_kinds(text) == {"PHB", "NODE"}
    assert link_kinds("\x1b[4mGPU0\tGPU1\tCPU Affinity\x1b[0m\nGPU0\t X \tNV18\t0\n"
                      "GPU1\tNV18\t X \t0\n") == {"NV18"}  # fmt: skip
    assert link_kinds("No devices were found\n") == set()


REPO = Path(__file__).resolve().parents[3]

# --- any text, in any field of any recording ---

TEXTS = [
    "", "[N/A]", "N/A", "[Unknown Error]", "[GPU is lost]", "[GPU requires reset]",
    "No devices were found", "ERR!", "0", "-1", "9" * 5000, "1e999", "\x1b[31m\x07", "\u0663",
    "null", "[]", "{}", '"', ",", "\n", "\ud7ff",
]  # fmt: skip


class KeptProbe:
    """Replies by question; a question without one is a program that is not installed."""

    def __init__(self, replies: dict[str, Reply]) -> None:
        self.replies = replies

    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        return self.replies.get(name, Reply(code=127, text=f"{argv[0]}: not found\n"))


@pytest.fixture(scope="module")
def recordings() -> dict[str, dict[str, Reply]]:
    def code(path: Path) -> int:
        kept = path.with_suffix(".code")
        return int(kept.read_text()) if kept.exists() else 0

    return {
        folder.name: {
            path.stem: Reply(code=code(path), text=path.read_text())
            for path in sorted(folder.glob("*.txt"))
        }
        for folder in sorted((REPO / "tests/fixtures/doctor").iterdir())
    }


@pytest.fixture(scope="module")
def deployments() -> list[tuple[Deployment, Needs]]:
    matrix = load(REPO)
    made = []
    for sku, preset in (("b300", "mtp"), ("rtxpro6000", "tp2-mtp")):
        cell = image_cell(matrix, sku)
        deployment = find_deployment(matrix, cell, preset)
        lock = read_lock(REPO, cell.line_name, cell.line, matrix.base)
        made.append((deployment, needs_of(lock, deployment)))
    return made


@pytest.mark.parametrize("text", [text for text in TEXTS if "\n" not in text and text != ","])
def test_no_text_in_a_gpu_row_ends_in_a_traceback(
    text: str,
    recordings: dict[str, dict[str, Reply]],
    deployments: list[tuple[Deployment, Needs]],
) -> None:
    replies = recordings["rtxpro6000"]
    for name in ("nvidia-smi", "nvidia-smi-health"):
        first, *rest = replies[name].text.splitlines(keepends=True)
        for place in range(first.count(",") + 1):
            fields = first.split(",")
            fields[place] = f" {text}"
            changed = Reply(code=0, text=",".join(fields).rstrip() + "\n" + "".join(rest))
            host = ask_host(KeptProbe({**replies, name: changed}))
            findings = judge(host, *deployments[1])
            assert all(finding.remedy for finding in findings if finding.level == "red")
            if text.startswith("[GPU"):  # an error in any field is a red line
                assert "red" in {finding.level for finding in findings}


@given(data=st.data())
def test_no_text_in_any_field_ends_in_a_traceback(
    data: st.DataObject,
    recordings: dict[str, dict[str, Reply]],
    deployments: list[tuple[Deployment, Needs]],
) -> None:
    replies = dict(recordings[data.draw(st.sampled_from(sorted(recordings)))])
    name = data.draw(st.sampled_from(sorted(replies)))
    text = replies[name].text
    # A field is what stands between commas, blanks, quotes and colons; or all of it.
    cuts = [0, *(i for i, mark in enumerate(text) if mark in ', \t\n":='), len(text)]
    begin, end = sorted(data.draw(st.tuples(*[st.sampled_from(cuts)] * 2), label="cut"))
    other = data.draw(st.sampled_from(TEXTS) | st.text(max_size=20))
    code = data.draw(st.sampled_from([replies[name].code, 0, 1, 127]))
    replies[name] = Reply(code=code, text=text[:begin] + other + text[end:])
    host = ask_host(KeptProbe(replies))
    for deployment, needs in deployments:
        findings = judge(host, deployment, needs)
        assert all(finding.remedy for finding in findings if finding.level == "red")
        shown = [line.plain for line in page(findings)]
        assert shown == [printable(line) for line in shown]
