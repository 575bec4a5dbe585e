"""Rehearsals of artifacts: their headers, what is drawn, what is a hole, and what goes wrong."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.gpu.harness.errors import InputError
from tests.gpu.harness.identity import identity
from tests.support.layouts import MADE, layout_config
from vllm_forge.checkpoints.checkpoint import Checkpoint, Folder
from vllm_forge.checkpoints.errors import (
    CheckpointDepartsError,
    CheckpointUnreadableError,
    NotSparseError,
    RehearsalError,
)
from vllm_forge.checkpoints.fixtures import full, sparse
from vllm_forge.checkpoints.fixtures.sparse import MARK
from vllm_forge.checkpoints.inspect.checks_tensors import files as files_of
from vllm_forge.checkpoints.inspect.manifest import named
from vllm_forge.checkpoints.inspect.profile import Part, Profile, part_of
from vllm_forge.cli import main
from vllm_forge.errors import UsageError
from vllm_forge.host import files, tree_bytes
from vllm_forge.host.errors import DiskSpaceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_forge.checkpoints.tensors import StoredTensor

SHARDS = 4
LAYOUTS = ("card", "w4a16-fp8-mtp", "nvidia-modelopt")
ARTIFACT = MADE["card"][0]
BIG = (1 << 25) + 5  # bytes: more than are hashed at a time


def recipe_of(variant: str) -> full.Recipe:
    return full.make_recipe(MADE[variant][0], layout_config(variant), SHARDS)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small rehearsal of a variant's layout, not to be changed."""
    cache = tmp_path_factory.mktemp("full")

    def make(variant: str) -> Path:
        if not (folder := cache / variant).exists():
            full.write_full(recipe_of(variant), folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def _here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``checkpoint fixtures``, with a small config in place of the artifacts' own."""
    monkeypatch.setattr(full, "artifact_config", lambda _: layout_config("card"))
    return lambda *args: main(["checkpoint", "fixtures", *map(str, args)])


@pytest.mark.parametrize("variant", LAYOUTS)
def test_headers_equal_the_manifest(variant: str, rehearsal: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(rehearsal(variant))
    wanted = named(MADE[variant][0]).wanted(layout_config(variant))
    assert {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()} == {
        tensor.name: (tensor.dtype, tensor.shape) for tensor in wanted
    }
    assert len(checkpoint.shards) == SHARDS
    assert checkpoint.misplaced == []
    assert checkpoint.total_size == checkpoint.bytes


@pytest.mark.parametrize("variant", LAYOUTS)
def test_inspection_passes_and_says_that_it_is_a_rehearsal(
    variant: str,
    rehearsal: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--resolve=rules", "--digests", "--line=0.33", "--json")
    assert main(["checkpoint", "inspect", str(rehearsal(variant)), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["artifact"] == MADE[variant][0]
    assert [row["what"] for row in report["findings"] if row["check"] == "rehearsal"] == [
        f"of {MADE[variant][0]}, its weights are holes"
    ]


def test_removed_marks_are_found_and_change_the_identity(
    tmp_path: Path,
    rehearsal: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(rehearsal("card"), tmp_path / "copy")
    with pytest.raises(InputError, match="this-is-a-rehearsal"):
        identity(folder)
    (folder / sparse.SIGN).rmdir()
    marked = identity(folder)
    config = json.loads((folder / "config.json").read_text())
    del config[MARK]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    assert identity(folder) != marked
    code = main(["checkpoint", "inspect", str(folder), "--resolve=rules"])
    assert code == CheckpointDepartsError.exit_code
    assert "differ on whether it is a rehearsal" in capsys.readouterr().err


@pytest.mark.parametrize("sign", [True, False], ids=["sign", "holes"])
def test_rehearsal_without_its_marks_is_found(sign: bool, tmp_path: Path) -> None:
    row = {"dtype": "BF16", "shape": [BIG // 2], "data_offsets": [0, BIG // 2 * 2]}
    shards = {"a.safetensors": json.dumps({"embed.weight": row})}
    full.write_full(hole() | {"shards": shards}, tmp_path / "made")
    (tmp_path / "made" / sparse.MANIFEST).unlink()
    (tmp_path / "made/config.json").write_text(json.dumps(layout_config("card")))
    if not sign:
        (tmp_path / "made" / sparse.SIGN).rmdir()
    (found, *_) = files_of(Profile.open(tmp_path / "made"))
    assert found.check == "rehearsal"
    assert ("this-is-a-rehearsal" if sign else "bytes are on disk") in found.what


@pytest.mark.parametrize(("blocks", "found"), [(0, False), (8, True), (1 << 17, False)])
def test_file_system_that_does_not_say_is_believed(
    blocks: int, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.safetensors").touch()
    folder = Folder(tmp_path)
    status = SimpleNamespace(st_size=BIG, st_blocks=blocks)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: status)
    monkeypatch.setattr(Path, "exists", lambda *_, **__: False)
    assert bool(folder.worthless) == found


def numbers(tensor: StoredTensor) -> np.ndarray[Any, Any]:
    data = bytes(tensor.read())
    if tensor.dtype == "BF16":
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).reshape(tensor.shape)
    return np.frombuffer(data, {"F32": "<f4", "I64": "<i8"}[tensor.dtype]).reshape(tensor.shape)


def test_small_tensors_are_finite_and_weights_are_zeros(
    rehearsal: Callable[[str], Path],
) -> None:
    config = layout_config("card")
    for name, tensor in Checkpoint.open(rehearsal("card")).tensors.items():
        part = part_of(name)
        small = tensor.dtype in {"F32", "I64"} or part in {Part.NORMS, Part.ROUTER}
        values = numbers(tensor) if small else np.zeros(0)
        assert np.isfinite(values).all(), name
        assert values.all() or not small or name.endswith("tid2eid"), name
        if part is Part.ROUTER:
            assert len(np.unique(values)) > 2, name
        if name.endswith("tid2eid"):
            assert (np.diff(np.sort(values, axis=1)) > 0).all()
            assert list(np.unique(values)) == list(range(config["n_routed_experts"]))
        if name.endswith((".weight_packed", "attn.wq_b.weight")):
            assert not any(tensor.read()), name


def test_first_rows_of_embedding_and_head_are_drawn(tmp_path: Path) -> None:
    config = layout_config("card") | {"vocab_size": full.ROWS + 64}
    recipe = full.make_recipe(ARTIFACT, config, 1)
    full.write_full(recipe, tmp_path / "made")
    for name in ("embed.weight", "head.weight"):
        rows = numbers(Checkpoint.open(tmp_path / "made").tensors[name])
        assert rows[: full.ROWS].any(axis=1).all()
        assert not rows[full.ROWS :].any()
    tokens = json.loads((tmp_path / "made/tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(tokens.values()) == list(range(config["vocab_size"]))


def test_packed_shape_is_that_of_the_weight(rehearsal: Callable[[str], Path]) -> None:
    tensors = Checkpoint.open(rehearsal("w4a16-fp8-mtp")).tensors
    config = layout_config("w4a16-fp8-mtp")
    shape = numbers(tensors["layers.0.ffn.experts.0.w2.weight_shape"]).tolist()
    assert shape == [config["hidden_size"], config["moe_intermediate_size"]]


def hole(size: int = BIG) -> dict[str, Any]:
    """A recipe of two files with a hole each."""
    row = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    shards = {f"{name}.safetensors": json.dumps({name: row}) for name in "ab"}
    texts = {"config.json": json.dumps({MARK: "x"})}
    blank = {"mark": "x", "seed": 1, "experts": 1, "texts": texts, "drawn": {}}
    return {**blank, "shards": shards}


def test_holes_take_no_disk(tmp_path: Path) -> None:
    full.write_full(hole(), tmp_path / "made")
    assert sum(path.stat().st_size for path in (tmp_path / "made").glob("[ab].*")) > 2 * BIG
    assert tree_bytes(tmp_path / "made") < 1 << 20
    record = json.loads((tmp_path / "made/manifest.json").read_text())
    assert record["tensors"]["a"]["sha256"] == hashlib.sha256(bytes(BIG)).hexdigest()


def test_draft_projections_are_drawn(rehearsal: Callable[[str], Path]) -> None:
    """Else the draft layer's hidden state is zero, and every draft the same token."""
    tensors = Checkpoint.open(rehearsal("card")).tensors
    assert all(numbers(tensors[f"mtp.0.{name}_proj.weight"]).all() for name in "eh")


def test_more_bytes_than_a_tensor_has_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: 2 bytes are more than 1"):
        full.write_full(hole(1) | {"drawn": {"a": "0000"}}, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_disk_needed_is_at_least_what_is_taken(rehearsal: Callable[[str], Path]) -> None:
    assert full.disk_needed(recipe_of("card")) >= tree_bytes(rehearsal("card"))


def program(folder: Path, target: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """Follow a recipe as a host without vllm-forge does, after some lines of Python."""
    code = f"import sparse; {before or 'pass'}\nsparse.main('{folder}/recipe.json.gz', '{target}')"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_program_of_the_recipe_writes_the_same_bytes(
    tmp_path: Path, command: Callable[..., int]
) -> None:
    assert command("full", "--artifact", ARTIFACT, tmp_path / "recipe", "--recipe") == 0
    assert command("full", "--artifact", ARTIFACT, tmp_path / "here") == 0
    done = program(tmp_path / "recipe", tmp_path / "there")
    assert (done.returncode, done.stderr) == (0, "")
    assert content(tmp_path / "here") == content(tmp_path / "there")
    assert program(tmp_path / "recipe", tmp_path / "there").stderr.count("exists already") == 1


@pytest.mark.parametrize("at", ["a", "b"])
def test_killed_run_leaves_nothing_that_looks_complete(at: str, tmp_path: Path) -> None:
    full.write_recipe(hole(4096), tmp_path / "recipe")
    die = (
        "import os; write = sparse._write_shard; sparse._write_shard = lambda path, *rest: "
        f"os.kill(os.getpid(), 9) if path.stem == '{at}' else write(path, *rest)"
    )
    assert program(tmp_path / "recipe", tmp_path / "made", die).returncode == -signal.SIGKILL
    assert not (tmp_path / "made").exists()
    assert program(tmp_path / "recipe", tmp_path / "made").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "recipe"]


def test_full_disk_is_refused_before_the_first_byte(
    tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _: 1 << 20)
    code = command("full", "--artifact", ARTIFACT, tmp_path / "made")
    assert code == DiskSpaceError.exit_code
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    full.write_recipe(hole(4096), tmp_path / "recipe")
    fill = "import os\ndef fail(*_): raise OSError(28, os.strerror(28))\nsparse._write_shard = fail"
    done = program(tmp_path / "recipe", tmp_path / "made", fill)
    assert done.returncode == 1
    assert f"cannot write {tmp_path}/made: [Errno {errno.ENOSPC}] No space left" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe"]


def row_of(**changes: object) -> dict[str, Any]:
    """A recipe whose only tensor has another row than hole(8)'s."""
    row = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8], **changes}
    return {"shards": {"a.safetensors": json.dumps({"a": row})}}


def text_of(name: str, text: object = "x") -> dict[str, Any]:
    return {"texts": {**hole()["texts"], name: text}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (text_of("../evil"), "'../evil' is not the name of a file"),
        (text_of("/evil"), "'/evil' is not the name of a file"),
        (text_of(sparse.MANIFEST), "'manifest.json' is not the name"),
        (text_of("a", 3), "not a string"),
        ({"shards": {"../evil": "{}"}}, "'../evil' is not the name of a file"),
        ({"mark": "another"}, "lacks its mark"),
        ({"mark": None}, "lacks its mark"),
        (text_of("config.json", "{}"), "lacks its mark"),
        ({"seed": None, "drawn": None}, "not a recipe"),
        (row_of(shape=[9]), "other offsets"),
        (row_of(data_offsets=[-8, 0]), "other offsets"),
        (row_of(shape=[10**18], data_offsets=[0, 10**18]), "other offsets"),
        (row_of(dtype="F4"), "not a recipe: KeyError"),
        ({"shards": dict.fromkeys(["a.safetensors", "b.safetensors"],
                                  row_of()["shards"]["a.safetensors"])}, "a is in two files"),
        ({"drawn": {"a": 10**12}}, "cannot draw"),
        ({"drawn": {"a": -1}}, "cannot draw"),
        ({"drawn": {"other": 1}}, "not a recipe: KeyError"),
    ],
)  # fmt: skip
def test_recipe_that_was_edited_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        sparse.write_sparse(hole(8) | change, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"[1]", b"null", b"\x1f\x8b\x08" + b"\xff" * 40])
def test_program_refuses_other_files(content: bytes, tmp_path: Path) -> None:
    full.write_recipe(hole(8), tmp_path / "recipe")
    packed = content if content[:1] == b"\x1f" else gzip.compress(content)
    (tmp_path / "recipe" / sparse.RECIPE).write_bytes(packed)
    done = program(tmp_path / "recipe", tmp_path / "made")
    assert done.returncode == 1
    assert done.stderr.startswith(f"sparse.py: cannot write {tmp_path}/made: ")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe"]


def test_recipe_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    full.write_recipe(hole(4096), tmp_path / "recipe")
    recipe = tmp_path / "recipe" / sparse.RECIPE
    recipe.write_bytes(recipe.read_bytes()[:-20])
    done = program(tmp_path / "recipe", tmp_path / "made")
    assert done.returncode == 1
    assert done.stderr.startswith(f"sparse.py: cannot write {tmp_path}/made: Compressed file")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe"]


def test_file_system_without_holes_is_refused(
    tmp_path: Path,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sparse, "allocated", lambda path: path.stat().st_size)
    code = command("full", "--artifact", ARTIFACT, tmp_path / "made")
    assert code == NotSparseError.exit_code
    assert "does not keep holes: a hole of 67108864 bytes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="run it where /dev/shm is tmpfs")
def test_tmpfs_which_allocates_what_is_read_is_refused() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with pytest.raises(NotSparseError, match="once read, takes 67108864 bytes"):
            full.write_full(hole(), Path(folder) / "made")
        assert list(Path(folder).iterdir()) == []


@pytest.mark.parametrize("size", [100, -1, 1])
def test_truncated_shard_is_refused(
    size: int,
    tmp_path: Path,
    rehearsal: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(rehearsal("card"), tmp_path / "copy")
    shard = folder / f"model-00002-of-{SHARDS:05}.safetensors"
    os.truncate(shard, size if size > 1 else shard.stat().st_size + size)
    code = main(["checkpoint", "inspect", str(folder), "--resolve=rules"])
    assert code == CheckpointUnreadableError.exit_code
    assert f"{shard.name} is not a whole safetensors file" in capsys.readouterr().err


def test_unknown_number_of_shards_is_refused(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    code = command("full", "--artifact", "redhat-nvfp4-fp8", tmp_path / "made")
    assert code == RehearsalError.exit_code
    assert "number of shards of redhat-nvfp4-fp8 is not recorded" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["checkpoint", "recipe"])
def test_existing_folder_is_kept(kind: str, tmp_path: Path, command: Callable[..., int]) -> None:
    (tmp_path / "mine").write_text("mine")
    options = ["--recipe"] if kind == "recipe" else []
    code = command("full", "--artifact", ARTIFACT, tmp_path, *options)
    assert code == RehearsalError.exit_code
    assert (tmp_path / "mine").read_text() == "mine"


def test_mistyped_artifact_is_suggested(
    tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    code = command("full", "--artifact", ARTIFACT[:-1], tmp_path / "made")
    assert code == RehearsalError.exit_code
    assert f"(did you mean '{ARTIFACT}'?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [["full"], ["--artifact", ARTIFACT, "made"], ["card", "full"], ["card", "--recipe"]],
    ids=" ".join,
)
def test_incomplete_arguments_are_rejected(
    args: list[str], tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*args) == UsageError.exit_code
