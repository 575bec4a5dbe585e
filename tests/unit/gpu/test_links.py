"""Links between ranks, and replicas, without a GPU: stand-ins for the servers and for NCCL."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gpu.harness import device
from tests.gpu.harness.bootlog import parse
from tests.gpu.links import servers, sums
from tests.gpu.links.link import LINKS, backends, transports
from tests.gpu.models import exact_moe
from tests.gpu.race_server.verdicts import judge
from tests.gpu.replicas import pair
from tests.gpu.tensor_parallel import shards
from vllm_forge.matrix import image_cell, load
from vllm_forge.serve.command import ServeOptions, service_of
from vllm_forge.serve.deployment import find_deployment

REPO = Path(__file__).parents[3]
FAKE = REPO / "tests" / "support" / "fake_vllm.py"
PEER = "h:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM\n"
HOST = "h:1:2 [1] NCCL INFO Channel 01 : 1[1] -> 0[0] via SHM/direct/direct\n"
NET = "h:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] [send] via NET/Socket/0\n"


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (PEER, {"P2P"}), (HOST, {"SHM"}), (HOST + PEER, {"P2P", "SHM"}), (NET, {"NET"}),
        ("NCCL INFO NCCL_P2P_DISABLE set by environment to 1.\n", set()),
    ],
)  # fmt: skip
def test_transports_of_all_channels_are_found(log: str, found: set[str]) -> None:
    assert transports(log) == found


def test_backends_are_those_of_the_ranks_group() -> None:
    """As line 0.26 said it on two H200, for the ranks of experts too."""
    rest = "out of potential backends: ['NCCL_SYMM_MEM', 'CUSTOM', 'SYMM_MEM', 'PYNCCL']."
    said = "INFO 11-30 12:39:17 [cuda_communicator.py:264] Using {} all-reduce backends (in "
    said += f"dispatch order) for group '{{}}:0' {rest}\n"
    log = said.format("['PYNCCL']", "ep") + said.format("['CUSTOM', 'PYNCCL']", "tp")
    assert backends(log) == ["CUSTOM", "PYNCCL"]
    assert backends("") == []


TORCH = """
class cuda:
    is_available = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda _: "NVIDIA H200")
    get_device_capability = staticmethod(lambda _: (9, 0))
"""


@pytest.mark.parametrize("gpus", [2, 4])
def test_all_that_tests_read_can_be_begun(gpus: int, tmp_path: Path) -> None:
    """The conftests of both folders add their jobs, on GPUs that torch would find."""
    (tmp_path / "torch.py").write_text(TORCH)
    folders = ["tests/gpu/links", "tests/gpu/replicas"]
    names = [f"--tier={name}{gpus}" for name in ("pcie", "replicas")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-qq", *names, *folders],
        cwd=REPO, text=True, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO / 'src'}",
             device.RANKS: str(gpus), device.VISIBLE: ",".join(map(str, range(gpus)))},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "tests/gpu/links/test_sums.py: " in done.stdout


RANK = """
import os, sys
from pathlib import Path

folder, rank, count, backend = sys.argv[1:]
assert count == "4" and backend == "MARLIN" and os.environ["NCCL_DEBUG"] == "INFO"
carrier = "SHM/direct/direct" if os.environ.get("NCCL_P2P_DISABLE") == "1" else "P2P/CUMEM"
log = os.environ.get("NCCL_DEBUG_FILE")  # what NCCL prints elsewhere may be lost
print(f"Channel 00 : {rank}[{rank}] -> 0[0] via {carrier}", file=open(log or os.devnull, "w", 1))
if rank == "3":
    import numpy
    for name in os.environ["WRITTEN"].split():
        numpy.save(Path(folder, name), numpy.ones(1))
"""


def test_ranks_add_up_over_a_link_or_are_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rank_of_a_test.py").write_text(RANK)
    kinds = [fault.name for fault in shards.Fault] + ["whole"]
    written = [f"{routed}-{kind}" for routed in shards.CELLS for kind in kinds]
    for name, value in (("PYTHONPATH", f"{tmp_path}"), (device.RANKS, "4"),
                        ("WRITTEN", " ".join(written))):  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shards, "JOB", "rank_of_a_test")
    found = {link: sums.run(link, "MARLIN", tmp_path) for link in LINKS}
    assert [sorted(each.sums) for each in found.values()] == [sorted(written)] * 2
    assert {link: transports(each.log) for link, each in found.items()} == {
        link: {row.transport} for link, row in LINKS.items()
    }
    monkeypatch.setenv("WRITTEN", written[0])
    (tmp_path / "again").mkdir()
    with pytest.raises(RuntimeError, match="via P2P/CUMEM"):
        sums.run("peer", "MARLIN", tmp_path / "again")


@pytest.fixture
def tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Four GPUs, an installed vllm that is the stand-in, and few tokens."""
    package = tmp_path / "site" / "vllm"
    for name in ("__init__.py", "entrypoints/__init__.py", "entrypoints/cli/__init__.py",
                 "model_executor/models/glm4_moe.py"):  # fmt: skip
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    shutil.copy(FAKE, package / "entrypoints" / "cli" / "main.py")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), str(REPO / "src")]))
    monkeypatch.setenv(device.VISIBLE, "2,3,5,7")
    monkeypatch.setattr(servers, "PARALLEL_TOKENS", 60)
    monkeypatch.setattr(exact_moe, "write", lambda folder, scheme, **_: folder)
    return monkeypatch


def test_each_link_is_taken_and_shown(tier: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tier.setenv(device.RANKS, "4")
    fleet, names = servers.LinkFleet(tmp_path, tmp_path), ("peer-int4-eager", "pcie-int4-eager")
    with ThreadPoolExecutor(len(names)) as pool:
        for name, found in zip(names, pool.map(fleet.run, names), strict=True):
            assert judge(found.answers).words == []
            assert "CUDA_VISIBLE_DEVICES=2,3,5,7" in found.log
            assert parse(found.log).settings["tensor_parallel_size"] == "4"
            assert backends(found.log) == ["PYNCCL"]
            assert transports(found.log) == {LINKS[servers.ARMS[name].link].transport}


def test_links_have_the_same_arms() -> None:
    arms: dict[str, list[str]] = {link: [] for link in LINKS}
    for name, arm in servers.ARMS.items():
        arms[arm.link].append(name.removeprefix(f"{arm.link}-"))
    assert arms["peer"] == arms["pcie"]
    assert len(arms["peer"]) == 2


@pytest.mark.parametrize("count", [2, 4])
def test_replicas_answer_side_by_side_on_their_shares(
    count: int, tier: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tier.setenv(device.RANKS, str(count))
    gpus = device.visible()[:count]
    used = iter([dict.fromkeys(gpus, 10), {gpu: 700 + place for place, gpu in enumerate(gpus)}])
    tier.setattr(pair, "_used", lambda: next(used))
    found, size = pair.run(tmp_path, tmp_path), count // 2
    for number, replica in found.items():
        own = gpus[(number - 1) * size :][:size]
        assert replica.grown == {gpu: 690 + gpus.index(gpu) for gpu in own}
        assert judge(replica.asked.answers).words == []
        assert f"CUDA_VISIBLE_DEVICES={','.join(own)} " in replica.asked.log
        assert transports(replica.asked.log) == ({"SHM"} if size > 1 else set())


def test_shares_are_those_that_serve_gives_its_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = load(REPO)
    monkeypatch.setenv(device.VISIBLE, "0,1,2,3")
    monkeypatch.setenv(device.RANKS, "4")
    two = find_deployment(matrix, image_cell(matrix, "rtxpro6000"), "tp2-mtp")
    made = [service_of(two, ServeOptions(replica=number)) for number in pair.REPLICAS]
    # Without a number, an engine takes the first ones.
    assert [row.gpu_ids or tuple("01") for row in made] == [
        tuple(pair.share(number)) for number in pair.REPLICAS
    ]
    assert len({row.port for row in made}) == len({row.name for row in made}) == 2
    assert made[0].volumes == made[1].volumes
    assert "--disable-custom-all-reduce" in made[0].command
