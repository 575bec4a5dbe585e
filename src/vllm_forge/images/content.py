"""What goes into an image: wheels to layers, and the record of it all (stack.json)."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.host import hash_of
from vllm_forge.images.wheels import Entry, merge, site_packages, wheel_entries
from vllm_forge.matrix import ImageCell
from vllm_forge.patches import PatchedWheel
from vllm_forge.patches.wheel import GENERATED
from vllm_forge.sources import Lock, LockedWheel

if TYPE_CHECKING:
    from vllm_forge.images.plan import ImagePlan
    from vllm_forge.images.system import System

# Raise when the bytes of a layer change for equal inputs.
FORMAT = 1
# Raise when an image's configuration changes for equal inputs.
CONFIG_FORMAT = 2
SLIM_FORMAT = 1
STACK = "opt/vllm-forge/stack.json"
HEALTH = Path(__file__).with_name("health.py")
VLLM = "vllm"


@dataclass(frozen=True, kw_only=True)
class WheelGroup:
    """Wheels of one layer, in the order of the lock, and the key under which it is kept."""

    name: str
    wheels: tuple[LockedWheel, ...]
    key: str
    slim_key: str | None = None  # of the SKU's layer of libraries; None without device code

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all its layers, lowest first."""
        return (self.key,) if self.slim_key is None else (self.key, self.slim_key)


def wheel_groups(cell: ImageCell, lock: Lock) -> tuple[WheelGroup, ...]:
    """The lock's wheels by layer, lowest first; vLLM itself is the last one."""
    members: dict[str, list[LockedWheel]] = {
        name: [] for name in (*(r.name for r in cell.layers), VLLM)
    }
    for wheel in lock.wheels:
        rules = (
            rule.name
            for rule in cell.layers
            if any(fnmatch.fnmatchcase(wheel.name, pattern) for pattern in rule.match)
        )
        members[VLLM if wheel.name == VLLM else next(rules)].append(wheel)
    with_code = {rule.name for rule in cell.layers if rule.code} | {VLLM}
    return tuple(
        _group(cell, name, wheels, code=name in with_code)
        for name, wheels in members.items()
        if wheels
    )


def group_entries(name: str, paths: Sequence[Path], python: str) -> list[Entry]:
    """Entries of the wheel layer ``name``.

    The vLLM layer leaves out what a patch series always changes (version and metadata), so
    that it is the same layer for every series of a line.
    """
    entries = merge(wheel_entries(path, python) for path in paths)
    if name == VLLM:
        start, version = (f"{site_packages(python)}/{name}" for name in ("vllm-", GENERATED))
        return [e for e in entries if not e.path.startswith(start) and e.path != version]
    return entries + cuda_links(entries)


def patch_entries(published: Path, patched: Path, python: str) -> list[Entry]:
    """Entries of the patched wheel that differ from the vLLM layer's."""
    below = {entry.path: entry.fingerprint for entry in group_entries(VLLM, [published], python)}
    entries = merge([wheel_entries(patched, python)])
    return [entry for entry in entries if below.get(entry.path) != entry.fingerprint]


def cuda_links(entries: Sequence[Entry]) -> list[Entry]:
    """Names that linkers ask for and the CUDA wheels lack.

    The wheels have ``nvidia/cu13/lib/libcudart.so.13``; ``-L$CUDA_HOME/lib64 -lcudart``, as
    the JIT compilers of FlashInfer and TileLang call it, wants ``lib64/libcudart.so``.
    """
    paths = {entry.path for entry in entries}
    links: dict[str, Entry] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if not folder.endswith("/nvidia/cu13/lib"):
            continue
        stem, so, version = name.partition(".so.")
        plain = f"{folder}/{stem}.so"
        if so and version.isdigit() and plain not in paths:
            links[plain] = Entry(path=plain, mode=0o777, link=name)
        lib64 = f"{folder}64"
        links[lib64] = Entry(path=lib64, mode=0o777, link="lib")
    return [links[path] for path in sorted(links)]


def stack_record(
    plan: ImagePlan, wheel: PatchedWheel, system: System, slim: dict[str, Any]
) -> dict[str, Any]:
    """The content of stack.json; ``slim``: library -> foreign device code that it lacks."""
    cell, lock, prewarm = plan.cell, plan.lock, plan.options.prewarm
    packages = {item.name: item.version for item in lock.wheels} | {VLLM: wheel.version}
    return {
        "sku": cell.sku_name,
        "arch": cell.sku.arch,
        "compute_capability": cell.sku.compute_capability,
        "line": cell.line_name,
        "vllm": wheel.version,
        "vllm_release": cell.line.vllm,
        "torch": cell.line.torch,
        "python": cell.line.python,
        "cuda": cell.line.cuda,
        "tree": wheel.tree,
        "series": [
            {"name": patch.name, "summary": patch.summary, "bug": patch.fields["Bug"]}
            for patch in plan.patches
        ],
        "changed_files": {file.path: file.after for file in wheel.changed},
        "lock": {"path": cell.line.lock, "sha256": lock.digest},
        "base": {
            "system": system.digest,
            "engine": plan.engine.name,
            "packages": plan.base.label,
        },
        "packages": packages,
        "debian": system.debian,
        "slim": slim,
        **({} if prewarm is None else {"prewarm": prewarm.record()}),
    }


def stack_entry(record: dict[str, Any]) -> Entry:
    content = json.dumps(record, indent=1, sort_keys=True) + "\n"
    return Entry(path=STACK, content=content.encode())


def labels(record: dict[str, Any], created: str) -> dict[str, str]:
    return {
        "io.vllm-forge.sku": record["sku"],
        "io.vllm-forge.arch": record["arch"],
        "io.vllm-forge.line": record["line"],
        "io.vllm-forge.tree": record["tree"],
        "io.vllm-forge.series": " ".join(patch["name"] for patch in record["series"]),
        "io.vllm-forge.lock": f"sha256:{record['lock']['sha256']}",
        "io.vllm-forge.base": record["base"]["packages"],
        "org.opencontainers.image.title": f"vLLM {record['vllm']} for {record['sku']}",
        "org.opencontainers.image.version": record["vllm"],
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.created": created,
        **({"io.vllm-forge.prewarm": record["prewarm"]["sha256"]} if "prewarm" in record else {}),
    }


def patch_key(cell: ImageCell, published: LockedWheel, record: dict[str, Any]) -> str:
    health = hashlib.sha256(HEALTH.read_bytes()).hexdigest()
    fields = [FORMAT, cell.base.source_date_epoch, published.sha256, record, health]
    return hash_of(fields, sort_keys=True)


def _group(cell: ImageCell, name: str, wheels: Sequence[LockedWheel], *, code: bool) -> WheelGroup:
    fields = [
        FORMAT,
        cell.base.source_date_epoch,
        site_packages(cell.line.python),
        name == VLLM,
        [wheel.sha256 for wheel in wheels],
    ]
    key = hash_of([*fields, "code apart"] if code else fields)
    slim_key = hash_of([SLIM_FORMAT, key, cell.sku.compute_capability]) if code else None
    return WheelGroup(name=name, wheels=tuple(wheels), key=key, slim_key=slim_key)
