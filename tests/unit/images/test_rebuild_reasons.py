"""Why a build would do something: every input is seen to change, and says what in it did."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_forge.cli import main
from vllm_forge.host import Runner
from vllm_forge.images import BuildOptions, build_image, choose_engine, resolve
from vllm_forge.images.errors import BuildRecordError, EngineSetupError
from vllm_forge.images.layout import blob_times, write_image
from vllm_forge.images.plan import why_rebuild
from vllm_forge.images.record import compare, differences, keep_digest
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_forge.images import ImagePlan

CELL = "vllm-0.26.0-b300"


def plan_of(checkout: Path, engine: str = "buildah") -> ImagePlan:
    project = Project(checkout)
    options = BuildOptions(output=checkout / "dist")
    return resolve(
        project, project.cell("b300", "0.26"), options, choose_engine(engine, dry_run=True)
    )


def test_build_on_another_processor_is_refused(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is downloaded: packages and checks are for x86_64."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(EngineSetupError, match="built on x86_64, and this host is aarch64"):
        build_image(plan_of(checkout), Runner())


@pytest.fixture
def built(checkout: Path) -> Path:
    """The record that a build of now would leave, and an image without layers."""
    plan = plan_of(checkout)
    image = write_image(plan.target, layers=[], config={}, epoch=1, name=plan.name)
    record: dict[str, Any] = {
        "digest": f"sha256:{image.digest}",
        "size": 1,
        "inputs": plan.inputs(),
        "blobs": blob_times(image),
        "engine": plan.engine.name,
    }
    plan.record_path.write_text(json.dumps(record))
    keep_digest(plan.record_path, plan.inputs(), record["digest"])
    return checkout


def other_package(checkout: Path) -> None:
    """Lock apt with another hash."""
    path = checkout / "docker" / "locks" / "debian-trixie.txt"
    text, count = re.subn(r"(\napt \S+ \S+ )[0-9a-f]{8}", r"\g<1>00000000", path.read_text())
    assert count == 1
    path.write_text(text)


def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(checkout: Path) -> None:
        text = (checkout / path).read_text()
        assert old in text
        (checkout / path).write_text(text.replace(old, new))

    return change


PATCH = "patches/vllm/0.26/0002-dsv4-wo-a-scale-name.patch"
# What is edited -> the inputs that change, and words of what is said of them.
EDITS: dict[str, tuple[Callable[[Path], None], set[str], list[str]]] = {
    "a patch": (
        edit(PATCH, "Description:", "Description: still"),
        {"series"},
        ["changed 0002-dsv4-wo-a-scale-name.patch: "],
    ),
    "a wheel of the lock": (
        edit(
            "docker/locks/0.26.txt",
            "attrs==26.1.0 --hash=sha256:c6",
            "attrs==26.1.0 --hash=sha256:d6",
        ),
        {"lock", "layers"},
        ["changed attrs: 26.1.0 c647aa4a12df -> 26.1.0 d647aa4a12df", "changed environment: "],
    ),
    "the SKU": (
        edit("matrix.toml", '"10.3a" }', '"10.3f" }'),
        {"sku"},
        ['changed env: {"TORCH_CUDA_ARCH_LIST": "10.3a"} -> {"TORCH_CUDA_ARCH_LIST": "10.3f"}'],
    ),
    "the line": (
        edit("matrix.toml", "budget_mb = 2900", "budget_mb = 4800"),
        {"line"},
        ["changed budget_mb: 2900 -> 4800"],
    ),
    "the Dockerfile": (
        edit("docker/Dockerfile", "EXPOSE 8000", "EXPOSE 8001"),
        {"system"},
        ["changed dockerfile: "],
    ),
    "the base": (
        edit("matrix.toml", "budget_mb = 240", "budget_mb = 241"),
        {"base"},
        ["changed budget_mb: 240 -> 241"],
    ),
    "a Debian package": (
        other_package,
        {"system", "debian"},
        ["changed apt: ", "changed base: "],
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_input_is_named(name: str, built: Path) -> None:
    change, inputs, words = EDITS[name]
    change(built)
    state, changes = why_rebuild(plan_of(built))
    assert state == "inputs changed"
    assert set(changes) == inputs
    parts = [part for parts in changes.values() for part in parts]
    for word in words:
        assert any(part.startswith(word) for part in parts), parts


def test_equal_inputs_mean_nothing_changed(built: Path) -> None:
    assert why_rebuild(plan_of(built))[0] == "nothing changed"


def test_missing_record_means_never_built(checkout: Path) -> None:
    assert why_rebuild(plan_of(checkout))[0] == "never built"


def test_missing_index_means_changed(built: Path) -> None:
    (built / "dist" / CELL / "index.json").unlink()
    assert why_rebuild(plan_of(built))[0] == "changed"


def test_other_engine_changes_the_system(built: Path) -> None:
    ((name, parts),) = why_rebuild(plan_of(built, "docker"))[1].items()
    assert name == "system"
    assert "changed engine: buildah -> docker" in parts


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"inputs": []}', '{"inputs": {"sku": "old"}}'])
def test_invalid_record_is_rejected(text: str, built: Path) -> None:
    (built / "dist" / f"{CELL}.json").write_text(text)
    with pytest.raises(BuildRecordError, match="not the record of a build"):
        why_rebuild(plan_of(built))
    assert main(["why-rebuild", "--sku=b300", "--line=0.26"]) == BuildRecordError.exit_code


def test_command_takes_the_engine_of_the_record(
    built: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another engine is the one that is here."""
    monkeypatch.setattr("vllm_forge.images.engines.Buildx.present", lambda self: True)
    assert main(["why-rebuild", "--sku=b300", "--line=0.26"]) == 0
    assert capsys.readouterr().out == f"{CELL}: nothing changed\n"
    EDITS["the SKU"][0](built)
    assert main(["why-rebuild", "--sku=sm103a", "--line=0.26"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [f"{CELL}: inputs changed", "  sku"]
    assert out[2].startswith("    changed env: ")


def test_inputs_survive_json(checkout: Path) -> None:
    inputs = plan_of(checkout).inputs()
    assert json.loads(json.dumps(inputs)) == inputs


def test_order_of_the_series_is_an_input(checkout: Path) -> None:
    inputs = plan_of(checkout).inputs()
    swapped = inputs | {"series": dict(reversed(inputs["series"].items()))}
    assert compare(inputs, swapped) == {"series": ("order or form only",)}


tables: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from("abcd"), st.one_of(st.integers(0, 2), st.sampled_from(["x", "y z"])), max_size=4
)


@given(tables, tables)
def test_every_part_that_differs_is_named_once(old: dict[str, Any], new: dict[str, Any]) -> None:
    sentences = differences(old, new)
    names = {name for name in {*old, *new} if old.get(name, "-") != new.get(name, "-")}
    assert len(sentences) == max(len(names), 1)
    for name in names:
        assert sum(f" {name}: " in part for part in sentences) == 1


@given(tables, tables)
def test_only_inputs_that_differ_are_changes(old: dict[str, Any], new: dict[str, Any]) -> None:
    old, new = ({name: {"value": value} for name, value in table.items()} for table in (old, new))
    assert compare(old, new).keys() == {n for n in {*old, *new} if old.get(n) != new.get(n)}
