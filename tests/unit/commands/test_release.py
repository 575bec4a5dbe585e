"""`release`, `verify` and the rest: what is refused before anything is built or asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support.keys import key_pair
from tests.support.release import committed_checkout
from vllm_forge.cli import main

if TYPE_CHECKING:
    from pathlib import Path

WAIVER = ["--waive", "kernel", "--waive", "server", "--until", "2199-12-31"]
REASON = ["--reason", "no such GPU in the lab before spring"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return committed_checkout(tmp_path_factory.mktemp("release") / "checkout")


@pytest.fixture
def committed(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A committed checkout, which no test here changes."""
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(template))


@pytest.mark.usefixtures("committed")
def test_blackwell_release_is_refused_with_what_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["release", "--sku", "b300", "--stage", "release"]
    assert main(argv) == 111
    text = capsys.readouterr().err
    assert "GateRefusedError (exit 111)" in text
    for tier in ("kernel", "server"):
        assert f"missing receipt of tier {tier} on NVIDIA B300 SXM6 AC (b300)" in text
        assert f"nox -s test-gpu -- --sku b300 --line 0.26 --tier {tier} --key KEY" in text
    assert "missing (2):" in text
    assert (
        "stage release also asks for: signed provenance, sbom (--key), independent builders: 2"
        in text
    )


@pytest.mark.usefixtures("committed")
def test_missing_key_is_listed_with_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["release", "b300", "--stage", "release", "--registry", "localhost:1/forge/vllm"]
    assert main(argv) == 111
    text = capsys.readouterr().err
    assert "missing (3):\n  - no key signs the statements" in text
    assert "missing receipt of tier server" in text


@pytest.mark.usefixtures("committed")
def test_missing_receipts_are_in_the_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["release", "b300", "--stage", "release", "--json"]) == 111
    document = json.loads(capsys.readouterr().out)
    assert [row["where"] for row in document["missing"]] == [
        f"records/receipts/<digest>/b300--0.26--{tier}.json" for tier in ("kernel", "server")
    ]


@pytest.mark.usefixtures("committed")
def test_waiver_is_shown_and_nothing_else_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["release", "b300", "--stage", "release", "--json", *WAIVER, *REASON]
    assert main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["missing"] == []
    assert [row["tier"] for row in document["waivers"]] == ["kernel", "server"]


@pytest.mark.usefixtures("committed")
def test_dry_run_prints_commands_and_the_form_of_the_tags(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    private, _ = key_pair(tmp_path / "key", "p256")
    argv = ["release", "b300", "--stage", "release", *WAIVER, *REASON, "--key", str(private)]
    assert main([*argv, "--registry", "localhost:1/forge", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert commands[0].startswith("nox -s forge -- build b300 --line=0.26 --base=locked")
    assert commands[1].startswith("skopeo copy ")
    assert lines[-1].endswith("0.26.0-forge.<n>-b300, 0.26-b300")


@pytest.mark.parametrize(
    ("argv", "code", "what"),
    [
        (["--stage", "release", *WAIVER], 110, "belong together"),
        (["--stage", "candidate", *WAIVER, *REASON], 110, "invalid --waive 'kernel'"),
        (["--stage", "final"], 2, "invalid choice 'final'"),
        (["--stage", "release", *WAIVER[:-1], "31.12.2199", *REASON], 2, "expected a date"),
        (["--stage", "dev", "--registry", "localhost:1/x", "--key", "k"], 2, "dev signs nothing"),
        (["--stage", "dev", "--registry", "localhost:1/x:tag"], 2, "the release chooses the tag"),
        (["--stage", "candidate", "--registry", "localhost:1/x"], 111, "no key signs"),
        (["--stage", "candidate", "--registry", "localhost:1/x", "--issuer", "x"], 2, "together"),
        (["--stage", "candidate", "--registry", "localhost:1/x", "--key", "none"], 100, "key"),
    ],
)
@pytest.mark.usefixtures("committed")
def test_invalid_release_is_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int, what: str
) -> None:
    assert main(["release", "b300", *argv]) == code
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "what"),
    [
        (["verify", "localhost:1/x:tag", "--offline"], 2, "--offline, and the image is in a reg"),
        (["verify", ".", "--offline", "--rebuild"], 2, "--rebuild downloads"),
        (["verify", "./nowhere"], 60, "image not found"),
        (["verify", "/"], 60, "get it again from where it was published"),
        (["verify", "usb/nowhere"], 2, "write the path of a folder as ./NAME"),
        (["mirror", "localhost:1/x:tag", "usb/vllm"], 2, "write the path of a folder as ./NAME"),
        (["verify", "user:password@localhost:1/x"], 2, "invalid image reference 'localhost:1/x'"),
        (["verify", "localhost:1/x:tag", "--key", "none"], 100, "not a public key"),
        (["verify", "localhost:1/x:tag", "--identity", "x"], 2, "belong together"),
        (["verify", "localhost:1/x"], 2, "neither a tag nor a digest"),
        (["verify", "localhost:1/x:tag"], 113, "the registry does not answer"),
        (["notes", "localhost:1/x:tag"], 113, "the registry does not answer"),
        (["sbom", "localhost:1/x:tag"], 113, "the registry does not answer"),
        (["mirror", "./nowhere", "localhost:1/x"], 60, "image not found"),
        (["receipts", "accept", "none"], 100, "none"),
        (["receipts", "sign", "none", "--key", "none"], 100, "not a private key"),
    ],
)
@pytest.mark.usefixtures("committed", "no_retries")
def test_invalid_image_is_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int, what: str
) -> None:
    assert main(argv) == code
    assert what in capsys.readouterr().err
