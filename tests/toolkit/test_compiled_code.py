"""Device code that nvcc compiles: the requested targets, and the same as cuobjdump lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import fatbins as made
from vllm_forge.kernels.coverage.contract import contract
from vllm_forge.kernels.coverage.device_code import Target, device_code, runs_on
from vllm_forge.kernels.coverage.families import Catalogue, SitePackages
from vllm_forge.kernels.coverage.library import compiled_for, kernels
from vllm_forge.kernels.errors import ContractError

from .conftest import KERNEL, Toolkit

pytestmark = pytest.mark.xdist_group("toolkit")
Compiled = Callable[..., Path]

# nvcc does not take sm_120 and sm_120f at once.
TARGETS = {
    "exact": "100a 103a 120a ptx:80",
    "family": "100f 120f ptx:100f ptx:120f",
    "plain": "100 103 120 ptx:120",
    "exact PTX": "90a ptx:90a ptx:103a",
    "LTO": "100a lto:100a lto:90",
}
OPTIONS = {
    "as is": (),
    "all compressed": ("-Xfatbin=-compress-all",),
    "uncompressed": ("-Xfatbin=-compress-mode=none",),
    "debug": ("-G",),
    "line numbers": ("-lineinfo",),
    "relocatable": ("-rdc=true",),
}
CASES = [
    *(("exact", options) for options in OPTIONS),
    *((targets, "as is") for targets in TARGETS if targets != "exact"),
    ("family", "all compressed"),
]


def asked(targets: str) -> Counter[tuple[str, str]]:
    return Counter(
        (target.rpartition(":")[0] or "cubin", target.rpartition(":")[2])
        for target in targets.split()
    )


def read(library: Path) -> Counter[tuple[str, str]]:
    codes = device_code(library.read_bytes(), library.name)
    return Counter((code.kind, str(code.target)) for code in codes)


@pytest.mark.parametrize(("targets", "options"), CASES)
def test_requested_targets_are_found(compiled: Compiled, targets: str, options: str) -> None:
    assert read(compiled(TARGETS[targets], OPTIONS[options])) == asked(TARGETS[targets])


@pytest.mark.parametrize(("targets", "options"), CASES)
def test_cuobjdump_sees_the_same(
    toolkit: Toolkit, compiled: Compiled, targets: str, options: str
) -> None:
    library = compiled(TARGETS[targets], OPTIONS[options])
    codes, names = toolkit.referee(library)
    found = read(library)
    assert found == codes
    mine = Counter(
        (str(body.target), name)
        for name, bodies in kernels(library.read_bytes()).items()
        for body in bodies
        if body.kind == "cubin"
    )
    assert mine == names
    assert len({name for _, name in mine}) == KERNEL.count("__global__")


def test_cuobjdump_listing_hides_the_family(toolkit: Toolkit, compiled: Compiled) -> None:
    """cuobjdump --list-elf is not enough: it calls 100f and 120f by the plain names."""
    library = compiled(TARGETS["family"])
    listed = toolkit.run("cuobjdump", "--list-elf", library)
    assert "sm_120.cubin" in listed
    assert "sm_120f" not in listed
    assert ("cubin", "120f") in read(library)


@pytest.mark.parametrize("targets", ["exact", "family", "plain"])
def test_each_cubin_notes_the_target_of_its_entry(compiled: Compiled, targets: str) -> None:
    """The suffix a second time, from inside: ptxas writes its -arch into a note."""
    library = compiled(TARGETS[targets]).read_bytes()
    cubins = [code for code in device_code(library) if code.kind == "cubin"]
    assert cubins
    for code in cubins:
        assert not code.compression
        assert compiled_for(library[code.offset : code.offset + code.size]) == code.target


GPUS = ("90a", "100a", "103a", "110a", "120a", "121a")
PTX = ("80", "90", "90a", "100", "100a", "100f", "103f", "120", "120f", "121a")


@pytest.mark.parametrize("target", PTX)
def test_ptxas_agrees_with_runs_on_about_ptx(toolkit: Toolkit, tmp_path: Path, target: str) -> None:
    (tmp_path / "k.cu").write_text(KERNEL)
    source = tmp_path / "k.ptx"
    toolkit.run("nvcc", "-ptx", f"-arch=compute_{target}", "-o", source, tmp_path / "k.cu")
    for name in GPUS:
        gpu = Target.parse(name)
        takes = toolkit.accepts("ptxas", f"-arch=sm_{gpu}", source, "-o", tmp_path / "k.cubin")
        assert takes == runs_on(Target.parse(target), "ptx", gpu.capability), f"sm_{gpu}"


ROWS = {
    "compiler": {},
    "family": {
        "adding": {
            "what": "the two kernels",
            "fix": "compile them for the GPU too",
            "kernels": [{"libraries": ["pkg/*.so"], "match": "3addPf|5scalePf"}],
        }
    },
    "need": {"always": ["adding"], "attention": {}, "linear": {}, "modules": {}, "experts": {}},
}


def check(site: Path, capability: tuple[int, int]) -> None:
    contract(
        SitePackages((site,), Catalogue.model_validate(ROWS)),
        cell="cell",
        line="x",
        capability=capability,
        answers={},
    ).check()


def install(site: Path, content: bytes) -> Path:
    path = site / "pkg" / "kernels.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_built_for_one_gpu_of_the_family_is_red_for_the_other(
    compiled: Compiled, tmp_path: Path
) -> None:
    install(tmp_path / "exact", compiled("100a").read_bytes())
    check(tmp_path / "exact", (10, 0))
    with pytest.raises(ContractError, match="adding: missing"):
        check(tmp_path / "exact", (10, 3))
    install(tmp_path / "family", compiled("100f").read_bytes())
    check(tmp_path / "family", (10, 3))


def test_one_architecture_taken_out(toolkit: Toolkit, compiled: Compiled, tmp_path: Path) -> None:
    whole = compiled(TARGETS["exact"], OPTIONS["all compressed"]).read_bytes()
    path = install(tmp_path, made.without(whole, lambda _, arch: arch == 120))
    codes, _ = toolkit.referee(path)
    assert codes == asked(TARGETS["exact"]) - Counter({("cubin", "120a"): 1})
    assert read(path) == codes
    check(tmp_path, (10, 3))
    with pytest.raises(ContractError, match=r"adding: ptx; 2 of 2 kernels .* run as 80 PTX"):
        check(tmp_path, (12, 0))
