"""What an image must hold for what vLLM selects: verdicts, exceptions, and what turns them red."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support import fatbins as made
from vllm_forge.images.checks import COVERAGE
from vllm_forge.kernels.coverage import library as library_module
from vllm_forge.kernels.coverage.contract import (
    PRESET,
    Contract,
    contract,
    families_of,
    line_record,
)
from vllm_forge.kernels.coverage.families import (
    FINE,
    Catalogue,
    SitePackages,
    best,
    catalogue,
    digest,
)
from vllm_forge.kernels.coverage.library import library_code
from vllm_forge.kernels.errors import (
    ContractError,
    StaleExceptionError,
    UnknownFamilyError,
    UnknownFatbinError,
)
from vllm_forge.kernels.selection.questions import Answer, Choice, Moe, Refusal
from vllm_forge.kernels.selection.record import read_selection
from vllm_forge.matrix import load
from vllm_forge.pages.kernels import coverage_table, render_coverage
from vllm_forge.sources import read_lock

B200, B300, RTX, H200 = (10, 0), (10, 3), (12, 0), (9, 0)
ROWS: dict[str, Any] = {
    "compiler": {"nvcc": {"files": ["nvidia/bin/nvcc"], "targets": "nvidia/bin/ptxas"}},
    "family": {
        "base": {
            "what": "what every cell needs",
            "fix": "a wheel that was built for the GPU",
            "kernels": [{"libraries": ["vllm/_C*.so"], "match": "base_kernel"}],
        },
        "marlin": {
            "what": "experts of one kind",
            "fix": "a wheel with Marlin for the GPU",
            "kernels": [{"libraries": ["vllm/_C*.so"], "match": "marlin_(a|b)$"}],
        },
        "jit": {
            "what": "compiled on first use",
            "fix": "the sources of the kernels",
            "sources": [{"files": ["gen/sm100*.cuh"], "compiler": "nvcc", "majors": [10]}],
        },
        "cubins": {
            "what": "kernels as files",
            "fix": "the package with the files",
            "cubins": [{"files": "cubins/*.cubin", "fetcher": "gen/loader.py"}],
        },
        "torch": {
            "what": "a library of many kernels",
            "fix": "a library built for the GPU",
            "libraries": [{"paths": ["torch/*.so"]}],
        },
    },
    "need": {
        "always": ["base"],
        "attention": {"MLA": ["jit"]},
        "linear": {"Gemm": ["torch"]},
        "modules": {"Plain": [], "Packed": ["torch"]},
        "experts": {"Nvfp4": {"MARLIN": ["marlin"], "GEN": ["cubins"]}},
    },
}
NATIVE: dict[str, dict[str, int] | list[str]] = {
    "cubin 90": {"base_kernel": 900, "marlin_a": 900, "marlin_b": 900},
    "cubin 100f": {"base_kernel": 900, "marlin_a": 900, "marlin_b": 900},
    "cubin 120f": {"base_kernel": 900, "marlin_a": 900, "marlin_b": 900},
    "ptx 80": ["marlin_a", "marlin_b"],
}
EXCEPTION: dict[str, Any] = {
    "family": "marlin",
    "verdict": "ptx",
    "lines": ["0.1"],
    "capabilities": ["10.3"],
    "reason": "the driver compiles it at the first launch, and keeps what it made",
}


def image(site: Path, code: dict[str, Any] | None = None) -> Path:
    """A site-packages folder with everything the families above want."""
    files: dict[str, bytes] = {
        "vllm/_C.abi3.so": made.kernel_library(code or NATIVE),
        "gen/sm100_gemm.cuh": b"//",
        "gen/loader.py": b"#",
        "nvidia/bin/nvcc": b"#!",
        "nvidia/bin/ptxas": b"sm_90a\0sm_100a\0sm_103a\0sm_120\0",
        "cubins/a.cubin": made.cubin("100f", {"k": 900}),
        "torch/t.so": made.library(made.fatbin(made.entry("cubin", "100"))),
    }
    for name, content in files.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return site


def rows(*exceptions: dict[str, Any]) -> Catalogue:
    return Catalogue.model_validate(ROWS | {"exception": exceptions})


def selects(
    attention: str | None = None,
    linear: str | None = None,
    schemes: tuple[str, ...] = (),
    experts: tuple[str, str] | None = None,
) -> Answer:
    """An answer to a preset's question; ``experts``: scheme and backend."""
    modules = {f"layers.{number}": scheme for number, scheme in enumerate(schemes)}
    return Answer(
        name="preset/p/a",
        attention=Choice(chosen=attention) if attention else None,
        linear=Choice(chosen=linear) if linear else None,
        moe=Moe(chosen=experts[1]) if experts else None,
        modules=modules | ({"layers.0.ffn.experts": experts[0]} if experts else {}),
    )


def check(
    site: Path, gpu: tuple[int, int], *chosen: Answer, exceptions: tuple[Any, ...] = ()
) -> Contract:
    return of_cell(SitePackages((site,), rows(*exceptions)), gpu, *chosen)


def of_cell(contents: SitePackages, gpu: tuple[int, int], *chosen: Answer) -> Contract:
    return contract(
        contents,
        cell="cell",
        line="0.1",
        capability=gpu,
        answers={answer.name: answer for answer in chosen},
    )


def verdicts(made_contract: Contract) -> dict[str, str]:
    return {item.family: item.coverage.verdict for item in made_contract.findings}


MARLIN = selects(experts=("Nvfp4", "MARLIN"))


@pytest.mark.parametrize(
    ("gpu", "verdict", "codes"),
    [(H200, "native", ("90",)), (B300, "family", ("100f",)), (RTX, "family", ("120f",))],
)
def test_native_code(tmp_path: Path, gpu: tuple[int, int], verdict: str, codes: object) -> None:
    found = check(image(tmp_path), gpu, MARLIN)
    found.check()
    assert verdicts(found) == {"base": verdict, "marlin": verdict}
    assert found.findings[0].coverage.codes == codes


def test_one_architecture_taken_out_is_red_and_names_the_families(tmp_path: Path) -> None:
    path = image(tmp_path) / "vllm" / "_C.abi3.so"
    check(tmp_path, RTX, MARLIN).check()
    path.write_bytes(made.without(path.read_bytes(), lambda kind, arch: arch // 10 == 12))
    with pytest.raises(ContractError) as caught:
        check(tmp_path, RTX, MARLIN).check()
    text = str(caught.value)
    assert "base: missing; 1 of 1 kernels have no code for it in vllm/_C.abi3.so: only" in text
    assert "cubin 100f, cubin 90" in text
    assert "needed by: every cell" in text
    assert "would help: a wheel that was built for the GPU" in text
    assert "marlin: ptx; 2 of 2 kernels in vllm/_C.abi3.so run as 80 PTX" in text
    assert "needed by: preset/p/a (experts MARLIN, Nvfp4)" in text
    check(tmp_path, B300, MARLIN).check()


def test_built_for_one_gpu_only_is_red_on_the_next_of_its_family(tmp_path: Path) -> None:
    image(tmp_path, {"cubin 100a": {"base_kernel": 900}})
    check(tmp_path, B200).check()
    with pytest.raises(ContractError, match="base: missing"):
        check(tmp_path, B300).check()


def test_one_kernel_without_code_is_enough(tmp_path: Path) -> None:
    """A family is as good as its worst kernel."""
    code = NATIVE | {"cubin 120f": {"base_kernel": 900, "marlin_a": 900}}
    found = check(image(tmp_path, code), RTX, MARLIN)
    assert verdicts(found) == {"base": "family", "marlin": "ptx"}
    assert "1 of 2 kernels" in found.findings[1].coverage.detail


def test_one_part_without_code_is_enough(tmp_path: Path) -> None:
    """The kernels are there, the sources beside them are not."""
    both = ROWS["family"]["base"] | {"sources": [{"files": ["gen/none.cuh"], "compiler": "nvcc"}]}
    catalog = Catalogue.model_validate(ROWS | {"family": ROWS["family"] | {"base": both}})
    contents = SitePackages((image(tmp_path),), catalog)
    found = contract(contents, cell="cell", line="0.1", capability=RTX, answers={})
    assert verdicts(found) == {"base": "missing"}
    assert found.findings[0].coverage.detail == "not there: gen/none.cuh"


def test_stub_does_not_count_as_code(tmp_path: Path) -> None:
    code = NATIVE | {"cubin 90": {"base_kernel": 70000}, "cubin 120f": {"base_kernel": 768}}
    assert verdicts(check(image(tmp_path, code), RTX)) == {"base": "missing"}


def test_missing_kernel_name_is_red(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"no such kernel in vllm/_C\*\.so"):
        check(image(tmp_path, {"cubin 120": {"renamed": 900}}), RTX).check()


def test_sources_and_their_compiler(tmp_path: Path) -> None:
    attention = selects(attention="MLA")
    image(tmp_path)
    assert verdicts(check(tmp_path, B300, attention))["jit"] == "source"
    # A part for 10.x says nothing of 12.x: needed and not made for it is missing.
    with pytest.raises(ContractError, match="it is not made for such a GPU"):
        check(tmp_path, RTX, attention).check()
    (tmp_path / "nvidia/bin/ptxas").write_bytes(b"sm_100a\0sm_103\0sm_103abc\0")
    with pytest.raises(ContractError, match="nvcc of this image does not know sm_103a"):
        check(tmp_path, B300, attention).check()
    (tmp_path / "gen/sm100_gemm.cuh").unlink()
    with pytest.raises(ContractError, match=r"not there: gen/sm100\*\.cuh"):
        check(tmp_path, B300, attention).check()


def test_cubins_there_for_another_gpu_or_to_download(tmp_path: Path) -> None:
    gen = selects(experts=("Nvfp4", "GEN"))
    image(tmp_path)
    assert verdicts(check(tmp_path, B300, gen))["cubins"] == "family"
    assert verdicts(check(tmp_path, RTX, gen))["cubins"] == "missing"
    (tmp_path / "cubins/a.cubin").unlink()
    with pytest.raises(ContractError, match="cubins: download; no cubins in the image"):
        check(tmp_path, B300, gen).check()
    (tmp_path / "gen/loader.py").unlink()
    with pytest.raises(ContractError, match="cubins: missing"):
        check(tmp_path, B300, gen).check()


DOWNLOAD = EXCEPTION | {"family": "cubins", "verdict": "download"}


def test_carried_archives_need_no_exception(tmp_path: Path) -> None:
    """That of the packages alone stays in the rows; an image that lacks the files is still red."""
    gen = selects(experts=("Nvfp4", "GEN"))
    (image(tmp_path / "site") / "cubins/a.cubin").rename(tmp_path / "a.cubin")
    plain = check(tmp_path / "site", B300, gen, exceptions=(DOWNLOAD,))
    plain.check()
    assert plain.downloads == {"cubins"}
    sites = (tmp_path / "site", tmp_path / "kernels")
    contents = SitePackages(sites, rows(DOWNLOAD))
    contents.carried = True
    with pytest.raises(ContractError, match="cubins: download"):
        of_cell(contents, B300, gen).check()
    (tmp_path / "kernels" / "cubins").mkdir(parents=True)
    (tmp_path / "a.cubin").rename(tmp_path / "kernels/cubins/b.cubin")
    contents = SitePackages(sites, rows(DOWNLOAD))
    contents.carried = True
    found = of_cell(contents, B300, gen)
    found.check()
    assert found.downloads == set()
    contents = SitePackages(sites, rows(DOWNLOAD))
    with pytest.raises(StaleExceptionError, match=r"cubins \(download\)"):
        of_cell(contents, B300, gen).check()


def test_each_library_must_have_code(tmp_path: Path) -> None:
    linear = selects(linear="Gemm")
    image(tmp_path)
    assert verdicts(check(tmp_path, B300, linear))["torch"] == "native"
    with pytest.raises(ContractError, match=r"torch: missing; torch/t\.so has no code for it"):
        check(tmp_path, RTX, linear).check()
    (tmp_path / "torch/t.so").unlink()
    with pytest.raises(ContractError, match=r"no torch/\*\.so"):
        check(tmp_path, B300, linear).check()


def test_an_upper_layer_hides_a_lower_one(tmp_path: Path) -> None:
    lower = image(tmp_path / "lower")
    upper = image(tmp_path / "upper", {"cubin 100": {"base_kernel": 900}})
    both = contract(
        SitePackages((lower, upper), rows()), cell="c", line="0.1", capability=RTX, answers={}
    )
    assert verdicts(both) == {"base": "missing"}


# --- exceptions -----------------------------------------------------------------------------------

PTX_ONLY = NATIVE | {"cubin 100f": {"base_kernel": 900}}


def test_exception_is_accepted_and_noted(tmp_path: Path) -> None:
    found = check(image(tmp_path, PTX_ONLY), B300, MARLIN, exceptions=(EXCEPTION,))
    found.check()
    assert found.notes == (f"marlin: ptx. {EXCEPTION['reason']}",)
    with pytest.raises(ContractError):
        check(tmp_path, B300, MARLIN).check()
    # Another GPU, another line, or a worse verdict than the row's, is not accepted.
    with pytest.raises(ContractError):
        check(tmp_path, B200, MARLIN, exceptions=(EXCEPTION,)).check()
    other = EXCEPTION | {"lines": ["0.2"]}
    with pytest.raises(ContractError):
        check(tmp_path, B300, MARLIN, exceptions=(other,)).check()
    image(tmp_path, {"cubin 100f": {"base_kernel": 900}, "cubin 120": {"marlin_a": 900}})
    with pytest.raises(ContractError, match="marlin: missing"):
        check(tmp_path, B300, MARLIN, exceptions=(EXCEPTION,)).check()


@pytest.mark.parametrize("chosen", [(MARLIN,), ()], ids=["native by now", "not selected any more"])
def test_a_stale_exception_fails(tmp_path: Path, chosen: tuple[Answer, ...]) -> None:
    with pytest.raises(StaleExceptionError, match=r"marlin \(ptx\)"):
        check(image(tmp_path), B300, *chosen, exceptions=(EXCEPTION,)).check()


def test_an_unknown_backend_is_an_error(tmp_path: Path) -> None:
    image(tmp_path)
    with pytest.raises(UnknownFamilyError, match=r"'MARLIM'.*did you mean 'MARLIN'"):
        check(tmp_path, RTX, selects(experts=("Nvfp4", "MARLIM")))
    for unknown in (
        selects(attention="FLASH"),
        selects(linear="Mul"),
        selects(experts=("Int3", "MARLIN")),
        selects(schemes=("Plain", "Pakced")),
    ):
        with pytest.raises(UnknownFamilyError):
            check(tmp_path, RTX, unknown)


@pytest.mark.parametrize(
    "change",
    [
        {"need": ROWS["need"] | {"always": ["bose"]}},
        {"exception": [EXCEPTION | {"family": "x"}]},
        {"exception": [EXCEPTION | {"reason": "because"}]},
        {"exception": [EXCEPTION | {"capabilities": ["103"]}]},
        {"family": ROWS["family"] | {"base": {"what": "nothing in it", "fix": "x" * 20}}},
        {"compiler": {}},
        {"extra": 1},
    ],
)
def test_invalid_rows_are_rejected(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Catalogue.model_validate(ROWS | change)


@pytest.mark.parametrize(
    ("code", "gpu", "result"),
    [
        (["ptx 80", "cubin 100f", "cubin 100a"], B200, ("native", "100a")),
        (["cubin 100", "cubin 103"], B300, ("native", "103")),
        (["cubin 100a", "cubin 100f", "ptx 90"], B300, ("family", "100f")),
        (["ptx 80", "ptx 90", "ptx 120"], B300, ("ptx", "90 PTX")),
        (["lto 75"], RTX, ("ptx", "75 LTO")),
        (["cubin 80", "ptx 120"], B300, ("missing", "")),
    ],
)
def test_best_code_is_chosen(code: list[str], gpu: Any, result: tuple[str, str]) -> None:
    assert best(code, gpu) == result


# --- the cache ------------------------------------------------------------------------------------


def test_a_file_is_read_once_and_again_when_it_was_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(made.kernel_library(NATIVE))
    first = library_code(path, ["marlin"])
    with monkeypatch.context() as patched:
        patched.setattr(library_module, "_read", None)  # would fail if it were called
        assert library_code(path, ["marlin"]) == first
    before = path.stat()
    path.write_bytes(made.without(path.read_bytes(), lambda kind, arch: arch == 120))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert "cubin 120f" not in library_code(path, ["marlin"]).code


def test_other_patterns_get_another_record(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(made.kernel_library(NATIVE))
    assert list(library_code(path, ["marlin"]).patterns) == ["marlin"]
    assert list(library_code(path, ["base"]).patterns) == ["base"]
    assert library_code(path).patterns == {}


def truncate(record: Path) -> None:
    record.write_text(record.read_text()[:20])


def claim(record: Path) -> None:
    record.write_text(re.sub("(80|90|100)", "75", record.read_text()))


def folder(record: Path) -> None:
    record.unlink()
    record.mkdir()


@pytest.mark.parametrize("change", [truncate, claim, folder])
def test_changed_cache_record_is_rewritten(
    change: Callable[[Path], None], tmp_path: Path, cache: Path
) -> None:
    """A contract may not be green by what a record of the cache claims."""
    path = tmp_path / "lib.so"
    path.write_bytes(made.kernel_library(NATIVE))
    whole = library_code(path)
    for record in list((cache / "coverage").rglob("*.json")):
        change(record)
    for _ in range(2):
        assert library_code(path) == whole


def test_unreadable_library_is_an_error_and_not_cached(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(made.library(made.fatbin(made.entry("ptx", "80", number=9))))
    with pytest.raises(UnknownFatbinError):
        library_code(path)
    assert list((cache / "coverage").glob("*.json")) == []


# --- families.toml --------------------------------------------------------------------------------


def test_rows_name_lines_and_gpus_of_the_matrix(root: Path) -> None:
    """An exception for a GPU that its line does not serve could not go stale."""
    matrix = load(root)
    served = {
        (name, matrix.sku[sku].compute_capability)
        for name, line in matrix.line.items()
        for sku in line.skus
    }
    for row in catalogue().exception:
        assert set(itertools.product(row.lines, row.capabilities)) <= served, row.family
    for family in catalogue().family.values():
        for part in family.parts:
            assert set(part.lines) <= set(matrix.line)


def test_every_family_is_needed_by_something() -> None:
    needed = set(catalogue().need.families())
    assert set(catalogue().family) - needed == set()


# --- records/coverage ---------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["0.22", "0.26", "0.33"])
def test_record_matches_lock_and_families(root: Path, line: str) -> None:
    matrix = load(root)
    record = json.loads((root / COVERAGE / f"{line}.json").read_text())
    lock = read_lock(root, line, matrix.line[line], matrix.base)
    again = f"run: nox -s forge -- kernels coverage --record --line {line}"
    assert (record["lock"], record["families"]) == (lock.digest, digest()), again
    skus = {name: sku.compute_capability for name, sku in matrix.sku.items()}
    assert record["skus"] == skus, again
    for family, cells in record["coverage"].items():
        for sku, cell in cells.items():
            held = cell["verdict"] in FINE or cell["exception"] is not None
            assert cell["needed_by"] is None or held, f"{family} on {sku}"


@pytest.mark.parametrize("line", ["0.22", "0.26", "0.33"])
def test_record_matches_kernel_selection(root: Path, line: str) -> None:
    matrix = load(root)
    record = json.loads((root / COVERAGE / f"{line}.json").read_text())
    recorded = read_selection(root / "records", line)
    for name in matrix.line[line].skus:
        answers = recorded.of_device(matrix.sku[name].device).answers
        needed = set(catalogue().need.always)
        for question, answer in answers.items():
            if question.startswith(PRESET) and answer.refused is None:
                needed.update(families_of(answer, catalogue().need))
        written = {f for f, cells in record["coverage"].items() if cells[name]["needed_by"]}
        assert written == needed, f"run: nox -s forge -- kernels coverage --record --line {line}"


def test_counted_schemes_are_needed_and_missing_backend_is_an_error() -> None:
    need = rows().need
    counted = selects(attention="MLA", schemes=("Plain in 3, Packed in 40",))
    assert families_of(counted, need) == {
        "jit": "attention MLA",
        "torch": "layers with Packed",
    }
    without = selects(experts=("Nvfp4", "MARLIN")).model_copy(update={"moe": Moe(chosen=None)})
    with pytest.raises(UnknownFamilyError, match="experts with Nvfp4 'none'"):
        families_of(without, need)


def test_refused_questions_and_the_grid_need_nothing(tmp_path: Path) -> None:
    answers = {
        "preset/p/b": Answer(name="preset/p/b", refused=Refusal(kind="device", message="no")),
        "grid/s/a": Answer(name="grid/s/a", attention=Choice(chosen="MLA")),
    }
    contents = SitePackages((image(tmp_path),), rows())
    found = contract(contents, cell="c", line="0.1", capability=B300, answers=answers)
    assert verdicts(found) == {"base": "family"}


def test_tables_show_accepted_missing_and_unneeded_families(
    tmp_path: Path,
) -> None:
    exception = EXCEPTION | {"capabilities": ["10.3"]}
    site = image(tmp_path, PTX_ONLY)
    gen = selects(experts=("Nvfp4", "GEN"))
    contracts = {
        "big": ("10.3", check(site, B300, MARLIN, exceptions=(exception,))),
        "small": ("12.0", check(site, RTX, gen)),
    }
    head = {"line": "0.1", "vllm": "0.1.0"}
    contents = SitePackages((site,), rows(exception))
    record = head | line_record(contents, "0.1", contracts)
    text = coverage_table(record, rows(exception))
    table = {row.split()[0]: row.split("  ") for row in text.splitlines()[2:7]}
    assert [cell.strip() for cell in table["marlin"] if cell] == ["marlin", "80 PTX *", "(120f)"]
    assert [cell.strip() for cell in table["cubins"] if cell] == ["cubins", "(100f)", "missing"]
    assert [cell.strip() for cell in table["jit"] if cell] == ["jit", "(nvcc)", "-"]
    assert EXCEPTION["reason"] in text
    assert "the package with the files" in text
    page = render_coverage([record], rows(exception))
    assert "| 80 PTX \\* | (120f) |" in page
    assert "| (100f) | **missing** |" in page
    assert "| `vllm/_C.abi3.so` |" in page
    assert json.loads(json.dumps(record)) == record
