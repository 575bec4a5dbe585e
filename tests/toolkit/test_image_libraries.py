"""Device code of vLLM's libraries: compared with cuobjdump, and without an architecture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.support import fatbins as made
from vllm_forge.kernels.coverage.contract import contract
from vllm_forge.kernels.coverage.device_code import device_code, parse_capability
from vllm_forge.kernels.coverage.families import SitePackages
from vllm_forge.kernels.coverage.library import kernels
from vllm_forge.kernels.errors import ContractError
from vllm_forge.kernels.selection.record import read_selection
from vllm_forge.matrix import image_cell, load

from .conftest import ROOT, Toolkit, line_sites

pytestmark = pytest.mark.xdist_group("toolkit")
MATRIX = load(ROOT)
LIBRARIES = ("_C*.abi3.so", "_moe_C*.abi3.so", "_flashmla_C.abi3.so")


@pytest.mark.parametrize("line", MATRIX.line)
def test_cuobjdump_sees_the_same_kernels(toolkit: Toolkit, line: str) -> None:
    """Every entry with its suffix, and every kernel of every cubin."""
    vllm = line_sites(line)[-1] / "vllm"
    libraries = [path for pattern in LIBRARIES for path in sorted(vllm.glob(pattern))]
    assert len(libraries) >= len(LIBRARIES)
    for path in libraries:
        codes, names = toolkit.referee(path)
        content = path.read_bytes()
        entries = device_code(content, path.name)
        assert Counter((code.kind, str(code.target)) for code in entries) == codes, path.name
        mine = Counter(
            (str(body.target), name)
            for name, bodies in kernels(content, path.name, entries).items()
            for body in bodies
            if body.kind == "cubin"
        )
        assert mine == names, path.name


def test_sm120_code_taken_out_of_the_stable_library_breaks_that_contract(tmp_path: Path) -> None:
    cell = image_cell(MATRIX, "sm120")
    sites = line_sites(cell.line_name)
    name = "vllm/_C_stable_libtorch.abi3.so"
    stripped = tmp_path / name
    stripped.parent.mkdir()
    whole = (sites[-1] / name).read_bytes()
    stripped.write_bytes(made.without(whole, lambda _, arch: arch // 10 == 12))
    recorded = read_selection(ROOT / "records", cell.line_name).of_device(cell.sku.device)

    def check(*sites: Path) -> None:
        contract(
            SitePackages(sites),
            cell=cell.name,
            line=cell.line_name,
            capability=parse_capability(cell.sku.compute_capability),
            answers=recorded.answers,
        ).check()

    check(*sites)
    with pytest.raises(ContractError) as caught:
        check(*sites, tmp_path)
    for family in ("dsv4_kv_insert", "indexer", "norm_activation", "fp8_quant", "nvfp4_quant"):
        assert f"{family}: missing" in str(caught.value)
    assert name in str(caught.value)
