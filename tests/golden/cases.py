"""The cases, and what the product gives for each now: one function a golden file."""

from __future__ import annotations

import json
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.golden import product
from tests.golden.compare import digest, normalise
from tests.golden.damage import DAMAGE, checkpoints
from tests.support.layouts import MADE, layout
from vllm_forge.images.record import keep_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).with_name("data")
# Of a checkout, what commands read; without dist/, where a build leaves records.
READ = (
    "benchmarks", "docker", "docs", "matrix.schema.json", "matrix.toml", "patches",
    "pyproject.toml", "records", "scripts", "src", "tests",
)  # fmt: skip
ENGINES = ("docker", "buildah")
BASE = f"registry.example/debian@sha256:{'1' * 64}"
BUILT: dict[str, Any] = {
    "digest": f"sha256:{'2' * 64}",
    "inputs": {},
    "blobs": {},
    "engine": "buildah",
}
# What is done to each preset's row -> fields; each is to make its rule speak.
EDITS: dict[str, dict[str, Any]] = {
    "as committed": {},
    "drafts 3": {"speculative_tokens": 3},
    "splits in 3": {"tensor_parallel": 3},
    "sets a retired variable": {"env": {"VLLM_TEST_FORCE_FP8_MARLIN": "1"}},
    "sets an unknown variable": {"env": {"VLM_USE_V1": "1"}},
    "asks for another KV cache": {"flags": ("--kv-cache-dtype=bfloat16", "--block-size=7")},
}
# What a vLLM's dry load gives.
LOADS: dict[str, dict[str, Any]] = {
    "clean": {"error": None},
    "stops": {"error": {"tensor": None, "message": "KeyError: 'x'"}},
    "short": {
        "error": None,
        "short": [{"parameter": "x.w13_weight", "count": 3, "filled": 4, "of": 8}],
    },
}


def linked_checkout(folder: Path) -> Path:
    """A checkout in ``folder`` that is this one, without receipts, which come and go.

    By links, but for what may not be linked.
    """
    folder.mkdir(parents=True)
    for name in READ:
        if name in {"docker", "patches", "records"}:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("receipts"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder)
        else:
            (folder / name).symlink_to(ROOT / name)
    return folder


def cells() -> Iterator[tuple[str, str]]:
    """SKU and line of every image."""
    for line, row in _matrix()["line"].items():
        for sku in row["skus"]:
            yield sku, line


def plan(work: Path) -> dict[str, Any]:
    """Plans, with the packages of a lock in short; one of a cell that was built."""
    root = linked_checkout(work / "root")
    with product.environment(root, work / "cache"):
        plans = {f"{sku} {line}": product.plan(sku, line) for sku, line in cells()}
        _built(root, "b300", "0.26")
        plans["b300 0.26, built"] = product.plan("b300", "0.26")
    for row in plans.values():
        _shorten(row)
    return _written(plans, work)


def _shorten(row: dict[str, Any]) -> None:
    """Long parts of a plan by their hash, and those that serve.json has."""
    packages = row["pins"]["packages"]
    row["pins"]["packages"] = [len(packages), digest(packages)]
    families = row["contract"].get("families", {})
    for name, family in families.items():
        reason = [] if family["exception"] is None else [digest(family["exception"])]
        families[name] = " ".join([family["verdict"], *family["codes"], *reason])
    for preset in row["presets"]:
        shell = _one_line(preset.pop("shell"))
        assert shell == shlex.join(preset["command"])
        preset["command"] = digest(shell)
        preset["bare"] = _one_line(preset["bare"])
        preset["note"] = digest(preset["note"])
    selections = [preset["selection"] for preset in row["presets"]] + list(row["lines"].values())
    for selection in selections:
        if isinstance(selection, dict) and isinstance(selection.get("graphs"), dict):
            selection["graphs"]["sizes"] = digest(selection["graphs"]["sizes"])


def serve(work: Path) -> dict[str, Any]:
    """`serve --print` of each preset with each artifact, on each line, for both engines."""
    root = linked_checkout(work / "root")
    texts: dict[str, Any] = {}
    with product.environment(root, work / "cache"):
        for words in _servings():
            ended = product.run(f"serve {words} --print")
            texts[words] = ended.verdict() or _one_line(ended.out)
        _built(root, "b300", "0.26")
        ended = product.run("serve --sku sm103a --preset b300-mtp --print")
        texts["b300-mtp, built"] = _one_line(ended.out)
        texts["b300-mtp, built: state and bare command"] = ended.err.splitlines()
    return _written(texts, work)


def build(work: Path) -> dict[str, Any]:
    """Commands of a dry run, and keys of an image's layers, of each cell with each engine."""
    root = linked_checkout(work / "root")
    with product.environment(root, work / "cache"):
        commands: dict[str, Any] = {
            f"{sku} {line} {engine}": {
                "commands": product.build_commands(f"build {sku} --line {line} --engine {engine}"),
                "keys": product.image_keys(root, sku, line, engine),
            }
            for sku, line in cells()
            for engine in ENGINES
        }
        for engine in ENGINES:
            for options in (
                f"--base {BASE}",
                "--base locked --provision",
                "--load --push localhost:5000/x:1",
                "--push registry.example/x:1 --output elsewhere",
            ):
                words = f"build sm120 --engine {engine} {options}"
                commands[words] = product.build_commands(words)
    return _written(commands, work)


def lint(work: Path) -> dict[str, Any]:
    """Findings on each preset, artifact and line, as committed and after each edit."""
    root = linked_checkout(work / "root")
    with product.environment(root, work / "cache"):
        found: dict[str, Any] = {}
        for line in _matrix()["line"]:
            for edit, changes in EDITS.items():
                findings = product.lint(root, line, changes)
                rows = found.setdefault(f"{line}, {edit}", {"cases": len(findings)})
                for case, whats in findings.items():
                    for what in whats:
                        rows.setdefault(what, []).append(case)
            found[f"{line}, command"] = product.run(f"lint-presets --line {line}").out
    return _written(found, work)


def doctor(work: Path) -> dict[str, Any]:
    """Findings on each recorded host, for each cell."""
    root = linked_checkout(work / "root")
    reports: dict[str, Any] = {}
    with product.environment(root, work / "cache"):
        for host in sorted(path.name for path in (ROOT / "tests/fixtures/doctor").iterdir()):
            for sku, line in cells():
                if line != _matrix()["default_line"] and host != sku:
                    continue
                words = f"--sku {sku} --line {line} --recorded {root}/tests/fixtures/doctor/{host}"
                ended = product.run(f"doctor {words} --json")
                reports[f"{host}: {sku} {line}"] = {
                    **ended.verdict(),
                    "findings": [
                        [
                            row["level"],
                            row["check"],
                            row["seen"],
                            row["needed"],
                            bool(row["remedy"]),
                        ]
                        for row in json.loads(ended.out)
                    ],
                }
    return _written(reports, work)


def inspect(work: Path) -> dict[str, Any]:
    """Each variant of the tiny checkpoint, by rules, by what a vLLM may say, and as recorded."""
    root = linked_checkout(work / "root")
    rows: dict[str, Any] = {}
    with product.environment(root, work / "cache"):
        recorded = product.recorded_verdicts(root)
        for name, record in recorded.items():
            rows[f"recorded: {name}"] = record
            if not _makeable(name):
                continue
            folder = layout(work / "layouts", name)
            rows[f"rules: {name}"] = product.inspect_rules(str(folder))
            rows[f"loaded: {name}"] = product.inspect_loaded(root, folder, LOADS)
        card, bf16 = layout(work / "layouts", "card"), layout(work / "layouts", "bf16")
        downcast = layout(work / "layouts", "downcast")
        for words in (
            f"{card}/model.safetensors.index.json",
            f"{card} --manifest bf16",
            f"{card} --source {bf16} --values 1",
            f"{downcast} --source {bf16} --values 0",
            f"{downcast} --without-mtp",
            f"{card} --line 0.22",
            f"{layout(work / 'layouts', 'old-expert-targets')} --line 0.33",
            f"{layout(work / 'layouts', 'redhat-no-mtp')} --without-mtp",
            f"{layout(work / 'layouts', 'dspark')} --without-mtp --line 0.33",
        ):
            rows[f"inspect {words}"] = product.inspect_rules(words)
    return _written(rows, work)


def damage(work: Path) -> dict[str, Any]:
    """Class, meaning and place of the error that each damage gives."""
    folders = checkpoints(work / "checkpoints", layout(work / "layouts", "card"))
    ended: dict[str, Any] = {}
    for number, (name, (edit, words)) in enumerate(DAMAGE.items()):
        root = linked_checkout(work / f"root-{number}")
        edit(root)
        command = words.format(root=root, work=work, card=folders / "card")
        with product.environment(root, work / "cache"):
            ended[name] = normalise(product.run(command).text(), {str(root): "<root>"})
    with product.environment(linked_checkout(work / "root"), work / "cache"):
        for folder in sorted(path for path in folders.iterdir() if path.name != "card"):
            command = f"inspect-checkpoint {shlex.quote(str(folder))} --resolve=rules"
            ended[f"checkpoint: {folder.name}"] = product.run(command).text()
    return _written(ended, work)


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    kind.__name__: kind for kind in (plan, serve, build, lint, doctor, inspect, damage)
}


def read(kind: str) -> dict[str, Any]:
    """A golden file."""
    golden: dict[str, Any] = json.loads((DATA / f"{kind}.json").read_text(encoding="utf-8"))
    return golden


def _makeable(variant: str) -> bool:
    """It is made without the quantization tools."""
    parent = product.parent_of(variant)
    return variant in MADE or (parent != "" and _makeable(parent))


def _matrix() -> dict[str, Any]:
    return tomllib.loads((ROOT / "matrix.toml").read_text(encoding="utf-8"))


def _servings() -> Iterator[str]:
    for line, row in _matrix()["line"].items():
        for name, preset in _matrix()["preset"].items():
            if preset["sku"] not in row["skus"]:
                continue
            for number, artifact in enumerate(preset["artifacts"]):
                for engine in ("docker", "podman") if number == 0 else ("docker",):
                    yield (
                        f"--sku {preset['sku']} --preset {name} --artifact {artifact} "
                        f"--line {line} --engine {engine}"
                    )


def _one_line(text: str) -> str:
    """A command that is spread over lines, with its words quoted the same way."""
    return shlex.join(shlex.split(text.replace("\\\n", " ")))


def _built(root: Path, sku: str, line: str) -> None:
    """The record that a build leaves."""
    release = _matrix()["line"][line]["vllm"]
    (root / "dist").mkdir()
    record = root / "dist" / f"vllm-{release}-{sku}.json"
    record.write_text(json.dumps(BUILT))
    keep_digest(record, {}, BUILT["digest"])


def _written(value: dict[str, Any], work: Path) -> dict[str, Any]:
    """As a golden file holds it."""
    places = {
        str(work / "root"): "<root>",
        str(work / "cache"): "<cache>",
        str(work): "<work>",
        str(ROOT): "<repo>",
    }
    result: dict[str, Any] = json.loads(json.dumps(normalise(value, places)))
    return result
