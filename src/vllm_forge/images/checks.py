"""What every image must pass before it gets its name: layout, size, kernels, and inside."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from vllm_forge.host import console, parse_json, remove
from vllm_forge.images import cubins
from vllm_forge.images.content import wheel_groups
from vllm_forge.images.errors import ImageCheckError, SizeBudgetError
from vllm_forge.images.layout import Image, ImageLayer, verify
from vllm_forge.images.store import require_stored
from vllm_forge.images.wheels import site_packages
from vllm_forge.kernels.coverage.contract import Contract, contract, line_record
from vllm_forge.kernels.coverage.device_code import parse_capability
from vllm_forge.kernels.coverage.families import SitePackages, digest
from vllm_forge.kernels.selection.questions import DRIVER
from vllm_forge.kernels.selection.record import (
    SelectionRecord,
    read_selection,
    require_fresh,
    selection_path,
)
from vllm_forge.matrix import ImageCell
from vllm_forge.project import Project

MB = 1_000_000
COVERAGE = Path("records/coverage")
# What runs inside; the first one is started.
SCRIPTS = (Path(__file__).with_name("image_checks.py"), DRIVER)
LAYER_CHECKS = Path(__file__).with_name("layer_checks.py")
PYTHON_ALONE = ("/opt/venv/bin/python", "-I", "-S")  # no file of a wheel runs in it
CHECK_ARGV = (*PYTHON_ALONE, "/mnt/image_checks.py")
ANY_UID = 1000770000  # without a name, as OpenShift gives one
COMPILER_CHECKS = frozenset({"compiler", "driver-link", "nvrtc"})
CHECKS = frozenset({
    "packages", "tree", "stack", "hygiene", "system", "wheel-files", "bytecode", "sandbox",
    "working-directory", "imports", "quantization", "kernels", "vllm-help", "vllm-version",
    "vllm-serve-help", "vllm-bench-serve-help", "vllm-bench-serve", "any-user-sandbox",
    "any-user-imports",
})  # fmt: skip


def write_inputs(folder: Path, expect: dict[str, Any]) -> None:
    """The scripts and what they must find, in a folder that any user can read."""
    remove(folder)
    folder.mkdir(parents=True)
    for script in SCRIPTS:
        shutil.copyfile(script, folder / script.name)
    (folder / "expect.json").write_text(json.dumps(expect))
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)


def any_user(uid_map: Path = Path("/proc/self/uid_map")) -> str:
    """``uid:gid`` of a user whom the image does not know, in group 0.

    The namespace of a rootless build maps fewer uids; its highest one has no name either.
    """
    rows = [[int(word) for word in line.split()] for line in uid_map.read_text().splitlines()]
    return f"{min(ANY_UID, max(first + count - 1 for first, _, count in rows))}:0"


def check_names(*, compiler: bool) -> frozenset[str]:
    """Names of the verdicts that the layers' checks and both runs inside must give together."""
    return CHECKS | (COMPILER_CHECKS if compiler else frozenset())


def judge(outputs: Sequence[str], names: frozenset[str]) -> dict[str, Any]:
    """Read the verdicts ``names``, each of which must be there once, of the runs' last lines.

    Raises ImageCheckError: one is red, missing, unknown or there twice.
    """
    refused = partial(ImageCheckError, where="inside the image")
    verdicts: dict[str, Any] = {}
    for output in outputs:
        try:
            rows = parse_json(output.strip().splitlines()[-1])
            twice = sorted(verdicts.keys() & rows.keys())
            verdicts |= {
                name: {key: row[key] for key in ("passed", "detail", "seconds")}
                for name, row in rows.items()
            }
        except (IndexError, ValueError, LookupError, TypeError, AttributeError):
            raise refused("the checks printed no verdicts", remedy=output[-2000:]) from None
        if twice:
            raise refused(f"duplicate verdicts: {', '.join(twice)}")
    if wrong := sorted(verdicts.keys() ^ names):
        raise refused(
            f"missing or unknown verdicts: {', '.join(wrong)}",
            remedy="a program of the image ended the checks or wrote into their output; look at "
            "its .pth files and sitecustomize",
        )
    for name, verdict in sorted(verdicts.items()):
        mark = "[green]ok[/]" if verdict["passed"] is True else "[red]FAILED[/]"
        detail = escape(f"{verdict['detail']} ({verdict['seconds']} s)")
        console.print(f"  {mark} {name}: {detail}")
    if failed := [name for name, verdict in verdicts.items() if verdict["passed"] is not True]:
        details = "\n".join(f"  {name}: {verdicts[name]['detail']}" for name in failed)
        what = f"{len(failed)} of {len(verdicts)} checks failed:\n{details}"
        remedy = "the image was not published; its layers are kept, so a rebuild is quick"
        raise refused(what, remedy=remedy)
    return verdicts


def check_layout(
    image: Image, config: dict[str, Any], hashed: Mapping[str, list[int]] | None = None
) -> None:
    """Check blobs and the expected ``config`` object; raises LayoutError or ImageCheckError.

    ``hashed``: see ``verify``.
    """
    verify(image, hashed=hashed)
    actual = image.config["config"]
    problems = [
        f"{key} is {actual.get(key)}, expected {config.get(key)}"
        for key in sorted(actual.keys() | config.keys())
        if actual.get(key) != config.get(key)
    ]
    if len(image.config["rootfs"]["diff_ids"]) != len(image.manifest["layers"]):
        problems.append("layers and diff_ids do not match")
    if problems:
        raise ImageCheckError("; ".join(problems), where=image.path)


def check_sizes(
    layers: Sequence[ImageLayer], systems: int, budget_mb: int, base_budget_mb: int
) -> None:
    """Print each layer's share; SizeBudgetError if the image or its ``systems`` lowest are over."""
    sizes = [layer.blob.size for layer in layers]
    total, base = sum(sizes), sum(sizes[:systems])
    table = Table("layer", "MB", "share", title="compressed size")
    for layer, size in zip(layers, sizes, strict=True):
        table.add_row(layer.name, f"{size / MB:.1f}", f"{100 * size / total:.1f} %")
    table.add_row("all", f"{total / MB:.1f}", f"budget {budget_mb} MB", style="bold")
    console.print(table)
    for name, size, budget in (("image", total, budget_mb), ("system", base, base_budget_mb)):
        if size > budget * MB:
            what = f"the {name} has {size / MB:.0f} MB, its budget is {budget} MB"
            remedy = "see the table for what grew; raise the budget there if that is intended"
            raise SizeBudgetError(what, where="matrix.toml, budget_mb", remedy=remedy)


def recorded_selection(project: Project, cell: ImageCell) -> SelectionRecord | None:
    """What the line's vLLM selects on a SKU, see ``require_fresh``; None if no preset serves."""
    if not any(preset.sku == cell.sku_name for preset in project.matrix.preset.values()):
        return None
    recorded = require_fresh(project, cell.line_name)
    return recorded.of_device(cell.sku.device)


def recorded_downloads(project: Project, cell: ImageCell) -> list[str]:
    """Kernel families that FlashInfer downloads for a SKU's presets, by the coverage of record."""
    path = COVERAGE / f"{cell.line_name}.json"
    if not (project.root / path).is_file():
        return []
    families = project.read_json(str(path), lambda data: data["coverage"])
    rows = {name: cells.get(cell.sku_name) for name, cells in families.items()}
    return [name for name, r in rows.items() if r and r["needed_by"] and r["verdict"] == "download"]


def contract_inputs(project: Project, line_name: str) -> dict[str, str]:
    """Hashes of what the kernel contract is a function of, apart from the image."""
    path = selection_path(project.records, line_name)
    recorded = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none"
    return {"selection": recorded, "families": digest()}


def contents_of(folders: Sequence[Path], python: str) -> SitePackages:
    """The environment of unpacked layers, lowest first, and the kernel archives that they carry."""
    sites = [folder / place for folder in folders for place in (site_packages(python), cubins.SITE)]
    contents = SitePackages(tuple(site for site in sites if site.is_dir()))
    contents.carried = any(site.match(cubins.SITE) for site in contents.sites)
    return contents


def image_contract(cell: ImageCell, recorded: SelectionRecord, contents: SitePackages) -> Contract:
    """Compare what vLLM selects for a SKU's presets with an image's files; see ``contract``."""
    return contract(
        contents,
        cell=cell.name,
        line=cell.line_name,
        capability=parse_capability(cell.sku.compute_capability),
        answers=recorded.answers,
    )


def line_coverage(project: Project, name: str) -> tuple[dict[str, Any], list[Contract]]:
    """Which kernels a line has code for: its record, and the contract of each of its cells."""
    line, lock, skus = project.matrix.line[name], project.lock(name), project.matrix.sku
    groups = wheel_groups(project.cell(line.skus[0], name), lock)
    layers = [require_stored(group.key) for group in groups]
    folders = [folder for layer in layers for folder in (layer.files, layer.code)]
    contents = contents_of(folders, line.python)
    recorded = read_selection(project.records, name)
    contracts = {
        sku: image_contract(project.cell(sku, name), recorded.of_device(row.device), contents)
        for sku, row in skus.items()
        if sku in line.skus
    }
    table = {sku: (row.compute_capability, contracts.get(sku)) for sku, row in skus.items()}
    record = {"line": name, "vllm": line.vllm, "lock": lock.digest, "families": digest()}
    return record | line_record(contents, name, table), list(contracts.values())
