"""A real release: engine, registry without a referrers API, processes that are killed or race."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.osv import export, record, since
from tests.support.project import REPO
from tests.support.release import commit, green_alpha, prepare
from vllm_forge.project import Project as ForgeProject
from vllm_forge.receipts.receipt import make_statement, write_receipt
from vllm_forge.release.registry import Reference, Repository
from vllm_forge.signing import load_private

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.project import Project

pytestmark = pytest.mark.engine

CANDIDATE, RELEASE, LINE = "0.1.0-forge.1-alpha-rc1", "0.1.0-forge.1-alpha", "mini-alpha"
NOX = """#!{python}
import os, sys
words = sys.argv[1:]
assert words[0] == "-s" and words[2] == "--", words
command = words[3:] if words[1] == "forge" else [words[1], *words[3:]]
os.execv(sys.executable, [sys.executable, "-m", "vllm_forge", *command])
"""


@dataclass(frozen=True, kw_only=True)
class Shop:
    """A checkout that can be released, and a registry for it."""

    project: Project
    keys: dict[str, Path]
    registry: str

    def argv(self, stage: str, name: str = "vllm", key: str = "release") -> list[str]:
        return [
            "release", "alpha", "--stage", stage, "--registry", f"{self.registry}/{name}",
            "--key", str(self.keys[key]),
        ]  # fmt: skip

    def resolve(self, tag: str, name: str = "vllm") -> str | None:
        return Repository(Reference.parse(f"{self.registry}/{name}")).resolve(tag)

    def verified(self, image: str, *options: str, code: int = 0) -> dict[str, Any]:
        done = self.project.run("verify", image, "--json", *options, code=code)
        report: dict[str, Any] = json.loads(done.stdout)
        return report


@pytest.fixture(scope="module")
def shop(built: Project, registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """Alpha of locked Debian packages as a candidate, and the receipt of a lab."""
    folder = tmp_path_factory.mktemp("shop")
    mini = built.copy(folder, "rootfs", "systems")
    keys = prepare(mini, folder)
    shop = Shop(project=mini, keys=keys, registry=registry)
    made = json.loads(mini.run(*shop.argv("candidate")).stdout)
    assert made["tags"] == [CANDIDATE]
    statement = make_statement(green_alpha(ForgeProject(mini.root), made["digest"]))
    receipt = write_receipt(folder / "lab", statement, load_private(keys["lab"]))
    shutil.copy(receipt, mini.root / "receipt.json")
    mini.run("receipts", "accept", "receipt.json")
    (mini.root / "receipt.json").unlink()
    commit(mini.root)
    yield shop


def test_release_names_the_candidate_and_can_be_repeated(shop: Shop) -> None:
    first = json.loads(shop.project.run(*shop.argv("release")).stdout)
    assert first["tags"] == [RELEASE, LINE]
    assert shop.resolve(RELEASE) == shop.resolve(LINE) == shop.resolve(CANDIDATE) == first["digest"]
    assert json.loads(shop.project.run(*shop.argv("release")).stdout) == first
    report = shop.verified(f"{shop.registry}/vllm:{LINE}", "--deep")
    assert report["verified"]
    assert report["digest"] == first["digest"]
    assert [row["tier"] for row in report["receipts"]] == ["server"]


def test_two_releases_at_once_agree(shop: Shop) -> None:
    processes = [shop.project.start(*shop.argv("release", "race")) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    report = shop.verified(f"{shop.registry}/race:{LINE}")
    assert report["not_counted"] == []


@pytest.mark.parametrize("moment", ["read all of it", "let the tags"])
def test_kill_9_leaves_no_name_and_the_next_run_succeeds(shop: Shop, moment: str) -> None:
    name = f"killed/{moment.replace(' ', '-')}"
    process = shop.project.start(*shop.argv("candidate", name))
    assert process.stderr is not None
    assert any(moment in line for line in process.stderr)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    # The last moment is printed before its tag is set, and may be seen after that.
    assert shop.resolve(CANDIDATE, name) is None or moment == "let the tags"
    shop.project.run(*shop.argv("candidate", name))
    report = shop.verified(f"{shop.registry}/{name}:{CANDIDATE}", "--stage", "candidate")
    assert report["verified"]
    assert report["not_counted"] == []


def test_mirrored_folder_is_verified_offline(shop: Shop, tmp_path: Path) -> None:
    shop.project.run(*shop.argv("release"))
    folder = tmp_path / "offline"
    shop.project.run("mirror", f"{shop.registry}/vllm:{RELEASE}", str(folder))
    report = shop.verified(str(folder), "--offline", "--deep")
    assert report["verified"]
    assert report["decision"]["tags"] == [RELEASE, LINE]
    back = f"{shop.registry}/copy:{RELEASE}"
    shop.project.run("mirror", str(folder), back)
    assert shop.verified(back)["verified"]


def test_candidate_is_not_taken_for_a_release(shop: Shop) -> None:
    shop.project.run(*shop.argv("candidate", "early"))
    report = shop.verified(f"{shop.registry}/early:{CANDIDATE}", code=111)
    assert not report["verified"]
    finding = report["findings"][0]
    assert finding["class"] == "DecisionError"
    assert finding["what"].endswith("there is one for: candidate")


def test_offline_refuses_a_registry(shop: Shop) -> None:
    image = f"{shop.registry}/vllm:{RELEASE}"
    assert shop.project.run("verify", image, "--offline", code=2)


def test_rebuild_gives_the_same_digest(shop: Shop) -> None:
    shop.project.run(*shop.argv("release"))
    report = shop.verified(f"{shop.registry}/vllm:{RELEASE}", "--rebuild")
    assert report["verified"]
    assert report["rebuilt"]


def test_documented_commands_do_what_the_pages_say(shop: Shop, tmp_path: Path) -> None:
    """Word for word, but for the assignments that say which registry and SKU are meant."""
    home, work, nox = tmp_path / "home", tmp_path / "checkout", tmp_path / "bin" / "nox"
    receipt = start_over(shop, work, home)
    nox.parent.mkdir()
    nox.write_text(NOX.format(python=sys.executable))
    nox.chmod(0o755)
    place = f"{shop.registry}/documented"
    environment = shop.project.environment | {
        "SKU": "alpha", "REGISTRY": place, "TAG": RELEASE, "IMAGE": f"{place}:{LINE}",
        "RECEIPT": receipt,
        "VLLM_FORGE_ROOT": str(work), "HOME": str(home),
        "PATH": f"{nox.parent}:{shop.project.environment['PATH']}",
        "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@localhost",
        "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@localhost",
    }  # fmt: skip
    pages = [
        (REPO / "docs" / "operate" / f"{name}.md").read_text() for name in ("release", "verify")
    ]
    refused, keys, *others = [block for page in pages for block in documented(page)]
    run(refused, work, environment, 111)
    run(keys, work, environment)
    add_row(work, pages[0])
    (waived,) = (block for block in others if "--waive" in block)
    others.remove(waived)
    for block in others:
        if "receipts accept" in block:  # before a waiver is not needed any more
            run(waived, work, environment)
        if "receipts sign" in block:
            shutil.copy(home / "unsigned.json", work / receipt)
            commit(work)
        if "--osv" in block:
            export(work, record("vllm", *since("0")))
        run(block, work, environment)


def documented(page: str) -> Iterator[str]:
    """The shell blocks of a page that are run here, without their assignments."""
    for before, block in re.findall(r"((?:[^\n]+\n)*)\n```sh\n(.*?)```", page, re.DOTALL):
        if "not run here" not in before.lower():
            yield re.sub(r"(?m)^(?:[A-Z]+=\S+ ?)+\n", "", block)


def run(block: str, work: Path, environment: dict[str, str], code: int = 0) -> None:
    argv = ["bash", "-euxc", block]
    done = subprocess.run(
        argv, cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, f"{block}\n{done.stdout[-999:]}\n{done.stderr[-2999:]}"


def start_over(shop: Shop, work: Path, home: Path) -> str:
    """A checkout without receipt and without the release's key; the lab's files at home.

    Returns where the receipt was.
    """
    shutil.copytree(shop.project.root, work)
    home.mkdir()
    shutil.copy(shop.keys["lab"], home / "lab-key.pem")
    (receipt,) = (work / "records/receipts").glob("*/*.json")
    shutil.move(receipt, home / "receipt.json")
    digest = f"sha256:{receipt.parent.name}"
    statement = make_statement(green_alpha(ForgeProject(work), digest))
    unsigned = write_receipt(home, statement)
    shutil.move(unsigned, home / "unsigned.json")
    table = work / "records/keys/keyring.toml"
    rows = re.split(r"(?m)^(?=\[key\.)", table.read_text())
    table.write_text("".join(row for row in rows if not row.startswith("[key.release]")))
    (work / "records/keys/release.pem").unlink()
    commit(work)
    return str(receipt.relative_to(work))


def add_row(work: Path, page: str) -> None:
    """What the page says to add to the keyring, valid for longer."""
    (row,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    with (work / "records/keys/keyring.toml").open("a") as file:
        file.write(re.sub(r"valid_until = \S+", "valid_until = 2199-01-01", row))
    commit(work)
