"""Bad input to each command: what is done to a checkout or a checkpoint, and the command."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Edit = Callable[[Path], None]

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def own(root: Path, name: str) -> Path:
    """A file of a linked checkout, as a copy that may be changed; its folders are copies too."""
    path = root
    for part in name.split("/")[:-1]:
        path /= part
        if path.is_symlink():
            target = path.resolve()
            path.unlink()
            path.mkdir()
            for item in target.iterdir():
                if item.is_dir():
                    (path / item.name).symlink_to(item)
                else:
                    shutil.copyfile(item, path / item.name)
    path = root / name
    if path.is_symlink():
        target = path.resolve()
        path.unlink()
        shutil.copyfile(target, path)
    return path


def none(root: Path) -> None:
    """The command itself is what is wrong."""


def replaced(name: str, old: str, new: str) -> Edit:
    """A file with the first ``old`` replaced."""

    def edit(root: Path) -> None:
        path = own(root, name)
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{name} has no {old!r}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return edit


def written(name: str, content: bytes) -> Edit:
    """A file with other content, or a new file."""

    def edit(root: Path) -> None:
        path = own(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return edit


def deleted(name: str) -> Edit:
    """A checkout without a file."""

    def edit(root: Path) -> None:
        own(root, name).unlink()

    return edit


MATRIX, LOCK, SERIES = "matrix.toml", "docker/locks/0.26.txt", "patches/vllm/0.26"
PATCH = f"{SERIES}/0002-dsv4-wo-a-scale-name.patch"
PLAN = "plan --sku b300 --json"
LINT = "lint-presets --line 0.26"
PATCHES = "patches --line 0.26"
DOCTOR = "doctor --sku b300 --recorded {root}/tests/fixtures/doctor/b300"
# What is wrong -> what makes it so, and the command.
DAMAGE: dict[str, tuple[Edit, str]] = {
    # The command line.
    "no command": (none, ""),
    "mistyped command": (none, "biuld b300"),
    "mistyped option": (none, "build b300 --dry-rum"),
    "abbreviated option": (none, "build b300 --dry"),
    "word too many": (none, "build b300 x:"),
    "build: unknown sku": (none, "build b30 --dry-run"),
    "build: no sku": (none, "build --dry-run"),
    "build: unknown line": (none, "build b300 --line 0.27 --dry-run"),
    "build: unsupported cell": (none, "build sm120 --line 0.22 --dry-run"),
    "build: unknown engine": (none, "build b300 --engine buildha --dry-run"),
    "build: base without digest": (none, "build b300 --base debian:13 --engine buildah --dry-run"),
    "build: prewarm is missing": (none, "build b300 --engine docker --prewarm {work}/no --dry-run"),
    "plan: unknown sku": (none, "plan --sku b30"),
    "plan: no sku": (none, "plan"),
    "plan: unknown line": (none, "plan --sku b300 --line 27"),
    "plan: unsupported cell": (none, "plan --sku h200 --line 0.22"),
    "serve: unknown preset": (none, "serve --sku b300 --preset mtq --print"),
    "serve: preset of another sku": (none, "serve --sku b300 --preset b200-mtp --print"),
    "serve: no preset": (none, "serve --sku b300 --print"),
    "serve: unknown artifact": (none, "serve --sku b300 --preset mtp --artifact x --print"),
    "serve: artifact of another preset": (
        none, "serve --sku b300 --preset mtp --artifact redhat-nvfp4-fp8 --print",
    ),
    "serve: artifact not served": (
        none, "serve --sku b300 --preset mtp --artifact nvidia-nvfp4 --line 0.26 --print",
    ),
    "serve: unknown engine": (none, "serve --sku b300 --preset mtp --engine lxc --print"),
    "doctor: unknown sku": (none, "doctor --sku b30 --recorded {root}/tests/fixtures/doctor/b300"),
    "doctor: unknown preset": (none, f"{DOCTOR} --preset x"),
    "doctor: unknown artifact": (none, f"{DOCTOR} --artifact x"),
    "doctor: record and recorded": (none, f"{DOCTOR} --record {{work}}/x"),
    "doctor: no recording": (none, "doctor --sku b300 --recorded {work}/nowhere"),
    "lint: unknown line": (none, "lint-presets --line 0.27"),
    "census: unknown line": (none, "census --line 0.27"),
    "oracle: unknown line": (none, "oracle --line 0.27"),
    "patches: unknown line": (none, "patches --line 0.27"),
    "prove: unknown line": (none, "prove --line 0.27"),
    "wheel: unknown line": (none, "wheel --line 0.27"),
    "install: unknown line": (none, "install --line 0.27"),
    "install: no interpreter": (none, "install --python {work}/nowhere"),
    "lock: unknown line": (none, "lock --line 0.27"),
    "fetch: unknown line": (none, "fetch --line 0.27"),
    "why: unknown sku": (none, "why-rebuild --sku b30"),
    "why: nothing was built": (none, "why-rebuild --sku b300 --engine buildah"),
    "why: unknown engine": (none, "why-rebuild --sku b300 --engine buildha"),
    "quantize: no model": (none, "quantize --model {work}/no --output {work}/out --dry-run"),
    "quantize: unknown recipe": (
        none, "quantize --model {card} --recipe nvfp5 --output {work}/out --dry-run",
    ),
    "quantize: model is quantized": (none, "quantize --model {card} --output {work}/out --dry-run"),
    "quantize: no output": (none, "quantize --model {card}"),
    "tiny: unknown variant": (none, "tiny crad"),
    "inspect: no place": (none, "inspect-checkpoint {work}/nowhere"),
    "inspect: unknown manifest": (none, "inspect-checkpoint {card} --manifest nvidia-nvpf4"),
    "inspect: unknown line": (none, "inspect-checkpoint {card} --line 0.27"),
    "inspect: values without a source": (none, "inspect-checkpoint {card} --values 1"),
    "inspect: negative values": (none, "inspect-checkpoint {card} --values -1 --source {card}"),
    "inspect: digests without a record": (
        none, "inspect-checkpoint {card} --resolve=rules --digests",
    ),
    "inspect: dry load of an index": (
        none, f"inspect-checkpoint {{card}}/{INDEX} --resolve=vllm",
    ),
    "inspect: unknown resolver": (none, "inspect-checkpoint {card} --resolve=guess"),
    "test-gpu: no time": (none, "test-gpu --sku h200 --minutes nan"),
    "test-gpu: no time at all": (none, "test-gpu --sku h200 --minutes 0"),
    "test-gpu: no workers": (none, "test-gpu --sku h200 -n 0"),
    "test-gpu: unknown tier": (none, "test-gpu --sku h200 --tier kernels"),
    "test-gpu: unknown sku": (none, "test-gpu --sku h100"),
    "test-gpu: checkpoint is missing": (none, "test-gpu --sku h200 --checkpoint a={work}/nowhere"),
    "test-gpu: checkpoint without a name": (none, "test-gpu --sku h200 --checkpoint {card}"),
    "test-gpu: workloads are missing": (none, "test-gpu --sku h200 --workloads {work}/nowhere"),
    "gpu-kit: image is missing": (none, "gpu-kit --sku h200 --output {work}/k --image {work}/no"),
    "gpu-kit: part of no size": (none, "gpu-kit --sku h200 --output {work}/k --max-part big"),
    "gpu-kit: no output": (none, "gpu-kit --sku h200"),
    "gpu-kit: output exists": (none, "gpu-kit --sku h200 --output {work}"),
    "receipts: result is missing": (none, "receipts --result {work}/nowhere.json"),
    "receipts: result is none": (none, "receipts --result {root}/matrix.schema.json"),
    "receipts: none signed": (none, "receipts --signed"),
    # matrix.toml.
    "matrix is missing": (deleted(MATRIX), PLAN),
    "matrix is not TOML": (written(MATRIX, b"[sku\n"), PLAN),
    "matrix is not UTF-8": (written(MATRIX, b"\xff\xfe"), PLAN),
    "matrix is empty": (written(MATRIX, b""), PLAN),
    "unknown key": (replaced(MATRIX, "default_line", "default_lime"), PLAN),
    "unknown key of a SKU": (replaced(MATRIX, "memory_gb = 180", "memory_gib = 180"), PLAN),
    "unknown default line": (replaced(MATRIX, '_line = "0.26"', '_line = "0.27"'), PLAN),
    "unknown SKU of a line": (replaced(MATRIX, 'skus = ["b200",', 'skus = ["b201",'), PLAN),
    "unknown SKU of a preset": (replaced(MATRIX, 'sku = "b300"', 'sku = "b30"'), PLAN),
    "unknown artifact of a preset": (
        replaced(MATRIX, 'artifacts = ["flash-nvfp4-fp8-mtp"', 'artifacts = ["flash"'), PLAN,
    ),
    "unknown CUDA of a line": (replaced(MATRIX, 'cuda = "13.0"', 'cuda = "12.9"'), PLAN),
    "memory is a word": (replaced(MATRIX, "memory_gb = 180", 'memory_gb = "180"'), PLAN),
    "arch is not one": (replaced(MATRIX, '"sm_100a"', '"100a"'), PLAN),
    "no SKU": (replaced(MATRIX, "[sku.h200]", "[sku.h201]"), PLAN),
    "other schema": (replaced(MATRIX, "schema_version = 1", "schema_version = 2"), PLAN),
    "zero GPUs": (replaced(MATRIX, "tensor_parallel = 4", "tensor_parallel = 0"), PLAN),
    # Locks.
    "lock is missing": (deleted(LOCK), PLAN),
    "lock is of other inputs": (replaced(LOCK, "# input: f", "# input: e"), PLAN),
    "lock without a hash": (replaced(LOCK, "--hash=sha256:", "--hush="), PLAN),
    "lock with a hash cut short": (replaced(LOCK, "sha256:22c6a1", "sha256:22"), PLAN),
    "lock is binary": (written(LOCK, b"\0\xff"), PLAN),
    "lock without vLLM": (replaced(LOCK, "\nvllm==", "\n# vllm=="), PLAN),
    "lock of a build": (deleted(LOCK), "build b300 --engine buildah --dry-run"),
    # Series.
    "series is missing": (deleted(f"{SERIES}/series"), PLAN),
    "series names no patch": (replaced(f"{SERIES}/series", "0003-", "0004-"), PLAN),
    "series leaves one out": (
        replaced(f"{SERIES}/series", "0003-dsv4-bf16-wo-a.patch\n", ""), PLAN,
    ),
    "series names one twice": (
        replaced(f"{SERIES}/series", "0003-dsv4-bf16-wo-a.patch", PATCH.rpartition("/")[2]), PLAN,
    ),
    "patch is empty": (written(PATCH, b""), PLAN),
    "patch without a header": (replaced(PATCH, "Bug:", "Bugs:"), PLAN),
    "patch with counts that lie": (replaced(PATCH, "\n@@ -", "\n@@ -9"), PLAN),
    "patch with DOS lines": (replaced(PATCH, "\n@@", "\r\n@@"), PLAN),
    "tree lock is missing": (deleted(f"{SERIES}/lock.toml"), PLAN),
    "tree lock is not TOML": (written(f"{SERIES}/lock.toml", b"[[["), PLAN),
    "tree lock without a key": (replaced(f"{SERIES}/lock.toml", "result =", "results ="), PLAN),
    "patches: series is missing": (deleted(f"{SERIES}/series"), PATCHES),
    "patches: patch is empty": (written(PATCH, b""), PATCHES),
    "patches: tree lock is not TOML": (written(f"{SERIES}/lock.toml", b"[[["), PATCHES),
    "dispositions are missing": (
        deleted("patches/vllm/dispositions.toml"), "inspect-checkpoint {card} --resolve=rules",
    ),
    "dispositions are not TOML": (
        written("patches/vllm/dispositions.toml", b"[[["),
        "inspect-checkpoint {card} --resolve=rules",
    ),
    # What was recorded.
    "selection is missing": (deleted("records/selection/0.26.json"), LINT),
    "selection is not JSON": (written("records/selection/0.26.json", b"{"), LINT),
    "selection is a list": (written("records/selection/0.26.json", b"[]"), LINT),
    "selection is of other presets": (
        replaced(MATRIX, "max-num-seqs=128", "max-num-seqs=256"), LINT,
    ),
    "selection is of another series": (
        replaced(f"{SERIES}/lock.toml", 'result = "7c43', 'result = "8c43'), LINT,
    ),
    "selection of a plan is missing": (deleted("records/selection/0.26.json"), PLAN),
    "selection of a plan is not JSON": (written("records/selection/0.26.json", b"{"), PLAN),
    "selection of an oracle is missing": (
        deleted("records/selection/0.26.json"), "oracle --line 0.26",
    ),
    "coverage of a plan is missing": (deleted("records/coverage/0.26.json"), PLAN),
    "coverage of a plan is not JSON": (written("records/coverage/0.26.json", b"{"), PLAN),
    "build record is not JSON": (written("dist/vllm-0.26.0-b300.json", b"{"), PLAN),
    "build record without a digest": (written("dist/vllm-0.26.0-b300.json", b"{}"), PLAN),
    "build record of a serving is a list": (
        written("dist/vllm-0.26.0-b300.json", b"[]"), "serve --sku b300 --preset mtp --print",
    ),
    "why: build record is not JSON": (
        written("dist/vllm-0.26.0-b300.json", b"{"), "why-rebuild --sku b300",
    ),
    "why: build record without inputs": (
        written("dist/vllm-0.26.0-b300.json", b"{}"), "why-rebuild --sku b300",
    ),
    # A host's recording.
    "recording of GPUs is empty": (
        written("tests/fixtures/doctor/b300/nvidia-smi.txt", b""), DOCTOR,
    ),
    "recording of an engine is not JSON": (
        written("tests/fixtures/doctor/b300/docker.txt", b"{"), DOCTOR,
    ),
    "recording of memory is words": (
        written("tests/fixtures/doctor/b300/meminfo.txt", b"much"), DOCTOR,
    ),
}  # fmt: skip


def checkpoints(folder: Path, card: Path) -> Path:
    """Folders with a damaged checkpoint each, named by the damage; ``card`` is the sound one."""
    folder.mkdir(parents=True)
    (folder / "card").symlink_to(card)
    config = json.loads((card / "config.json").read_text())
    for name, changes in CHECKPOINTS.items():
        target = folder / name
        target.mkdir()
        for path in card.iterdir():
            if changes.get(path.name, b"") is not None:
                shutil.copyfile(path, target / path.name)  # not read by a link
        for file, content in changes.items():
            if content is None:
                continue
            (target / file).unlink(missing_ok=True)
            if isinstance(content, int):
                (target / file).write_bytes((card / file).read_bytes()[:content])
            elif isinstance(content, bytes):
                (target / file).write_bytes(content)
            else:
                (target / file).write_text(json.dumps(_merged(config, content)))
    return folder


def _merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in changes.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            merged[key] = _merged(inner, value)
        else:
            merged[key] = value
    return merged


def _config(**changes: Any) -> dict[str, Any]:
    return {"config.json": changes}


def _quantization(**changes: Any) -> dict[str, Any]:
    return _config(quantization_config=changes)


# What is wrong -> file: its content, None for no file, its new length, or changes of the config.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "no config": {"config.json": None},
    "config is empty": {"config.json": b""},
    "config is a list": {"config.json": b"[]"},
    "config has a key twice": {"config.json": b'{"a":1,"a":2}'},
    "no index": {INDEX: None},
    "index is deep": {INDEX: b"[" * 200_000},
    "index without a map": {INDEX: b"{}"},
    "a shard is missing": {SHARDS[1]: None},
    "a shard is empty": {SHARDS[0]: 0},
    "a header is cut off": {SHARDS[0]: 500},
    "data is cut off": {SHARDS[0]: -1},
    "no tokenizer": {"tokenizer.json": None},
    "a record is deep": {"manifest.json": b"[" * 200_000},
    "method is unknown": _quantization(quant_method="awq"),
    "method is another": _quantization(quant_method="fp8"),
    "groups are a list": _quantization(config_groups=[]),
    "ignore is a word": _quantization(ignore="lm_head"),
    "ignore does not compile": _quantization(ignore=["re:("]),
    "no quantization": _config(quantization_config=None),
    "layers are a word": _config(num_hidden_layers="3"),
    "a layer too many": _config(num_hidden_layers=4),
    "a layer too few": _config(num_hidden_layers=2),
    "experts beyond memory": _config(n_routed_experts=10**8),
    "another width": _config(hidden_size=512),
    "another vocabulary": _config(vocab_size=65),
    "half a DSpark config": _config(dspark_target_layer_ids=[1]),
}
