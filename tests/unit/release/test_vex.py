"""OpenVEX: hand-kept rows, each about packages that the image has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.built import Built, built_image
from tests.support.fast_build import use
from vllm_forge.release.errors import VexError
from vllm_forge.release.statements import VEX, make_vex
from vllm_forge.release.statements import VEX_FILE as FILE
from vllm_forge.signing.bundle import Statement

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.xdist_group("vex")  # one worker builds what its fixtures have

HEAD = 'author = "A Person"\nversion = 3\n'
ROW = """
[[statement]]
vulnerability = "CVE-2026-0001"
packages = ["pkg:cargo/adler2@2.0.1"]
lines = ["mini"]
status = "not_affected"
justification = "vulnerable_code_not_in_execute_path"
impact = "nothing compresses with it"
date = 2026-11-30
"""


@pytest.fixture(scope="module")
def module_built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    with built_image(tmp_path_factory.mktemp("vex")) as built:
        yield built


@pytest.fixture
def built(module_built: Built, monkeypatch: pytest.MonkeyPatch) -> Iterator[Built]:
    use(module_built.mini, monkeypatch)
    yield module_built
    (module_built.mini.root / FILE).unlink(missing_ok=True)


def make(built: Built, text: str) -> Statement | None:
    path = built.mini.root / FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return make_vex(built.project, built.cell, built.image, built.record)


def document(built: Built, text: str) -> dict[str, Any]:
    statement = make(built, text)
    assert statement is not None
    assert statement.has_subject(f"sha256:{built.image.digest}")
    assert statement.predicate_type == VEX
    return statement.predicate


def test_row_is_about_a_package_in_the_image(built: Built) -> None:
    data = document(built, HEAD + ROW)
    assert data["@context"] == "https://openvex.dev/ns/v0.2.0"
    assert (data["author"], data["version"]) == ("A Person", 3)
    assert data["timestamp"] == "2026-11-30T00:00:00+00:00"
    (row,) = data["statements"]
    (product,) = row["products"]
    assert row["vulnerability"] == {"name": "CVE-2026-0001"}
    assert row["status"] == "not_affected"
    assert "action_statement" not in row
    assert product["hashes"] == {"sha-256": built.image.digest}
    assert product["subcomponents"] == [{"@id": "pkg:cargo/adler2@2.0.1"}]


@pytest.mark.parametrize("purl", ["pkg:pypi/torch@2.0.0", "pkg:pypi/vllm@0.1.0"])
def test_packages_and_patched_releases_are_known(built: Built, purl: str) -> None:
    data = document(built, HEAD + ROW.replace("pkg:cargo/adler2@2.0.1", purl))
    assert data["statements"][0]["products"][0]["subcomponents"] == [{"@id": purl}]


def test_image_without_rows_has_no_statement(built: Built) -> None:
    assert make_vex(built.project, built.cell, built.image, built.record) is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("adler2@2.0.1", "adler2@2.0.2", "does not have"),
        ('["mini"]', '["mini", "9.9"]', r"line 9\.9, which is not defined"),
        ('justification = "vulnerable_code_not_in_execute_path"', "", "needs a justification"),
        ('"not_affected"', '"affected"', "needs an action"),
        ('"not_affected"', '"harmless"', "status"),
        ("CVE-2026-0001", "CVE 1", "vulnerability"),
        ("nothing", "\\u0007", "impact"),
        ("date = 2026-11-30", "", "date"),
    ],
)
def test_row_that_is_wrong_is_refused(built: Built, old: str, new: str, said: str) -> None:
    assert old in ROW
    with pytest.raises(VexError, match=said):
        make(built, HEAD + ROW.replace(old, new))
