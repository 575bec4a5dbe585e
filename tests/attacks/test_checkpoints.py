"""Checkpoints of strangers: folders, archives that were unpacked, repositories of a hub.

Whoever made one wrote every byte, name and link of it. An inspection ends soon, with a verdict or
an error of its room; nothing of the host beside the checkpoint is read, and nothing blocks.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.hub_server import HubServer
from tests.support.layouts import layout
from tests.support.memory import Files, inspect_files
from vllm_forge.checkpoints import checkpoint as checkpoint_module
from vllm_forge.checkpoints.checkpoint import Checkpoint, Folder, find_source
from vllm_forge.checkpoints.errors import (
    CheckpointDepartsError,
    CheckpointRefusedError,
    CheckpointUnreadableError,
    DryLoadError,
    HubUnreachableError,
    ModelInputError,
    RecipeError,
)
from vllm_forge.checkpoints.inspect.checks_tensors import read_scalars
from vllm_forge.checkpoints.inspect.dry_load import read_answers
from vllm_forge.checkpoints.inspect.page import show
from vllm_forge.checkpoints.inspect.profile import PIECES, Format, Profile, stored_as
from vllm_forge.checkpoints.inspect.values import compare
from vllm_forge.checkpoints.quantize import inputs
from vllm_forge.checkpoints.quantize.inputs import read_conversations
from vllm_forge.checkpoints.tensors import StoredTensor, TensorSpec
from vllm_forge.cli import main
from vllm_forge.errors import ForgeError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SHARD, OTHER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
READ = (CONFIG, INDEX, SHARD, "manifest.json", "hf_quant_config.json")
UNREADABLE = CheckpointUnreadableError.exit_code
ENDS = {0, CheckpointRefusedError.exit_code, CheckpointDepartsError.exit_code, UNREADABLE}


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """A reader that blocks is interrupted, which is no ForgeError."""
    signal.alarm(100)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layout(tmp_path_factory.mktemp("foreign"), "card")


@pytest.fixture
def card(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "card", copy_function=shutil.copyfile)


@pytest.fixture(scope="module")
def files(original: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in original.iterdir()}


def inspect(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    return main(["checkpoint", "inspect", str(folder), "--resolve=rules"])


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 33)


KINDS: dict[str, Callable[[Path], Any]] = {
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "socket": a_socket,
    "large": large,
    "outside": lambda path: path.symlink_to("/etc/passwd"),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", KINDS)
def test_file_of_any_kind_ends_the_inspection(
    card: Path, root: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    monkeypatch.chdir(card)  # a socket's path is short
    (card / name).unlink(missing_ok=True)
    KINDS[kind](card / name)
    code = inspect(card, root, monkeypatch)
    assert code in ENDS
    if kind == "outside" or name == CONFIG or (kind == "large" and name != "manifest.json"):
        assert code == UNREADABLE


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_file_that_is_replaced_while_it_is_read_does_not_block(card: Path, kind: str) -> None:
    source = Folder(card)
    (card / CONFIG).unlink()
    KINDS[kind](card / CONFIG)
    with pytest.raises(CheckpointUnreadableError, match=f"cannot read {CONFIG}"):
        source.config()


def test_links_of_shards_within_a_checkpoint_and_to_the_hub_cache_are_followed(
    original: Path, tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    shutil.copytree(original, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert Checkpoint.open(snapshot).names == Checkpoint.open(original).names
    (blobs / "link.json").symlink_to(CONFIG)
    (blobs / SHARD).unlink()
    (blobs / SHARD).symlink_to(original / SHARD)
    assert Checkpoint.open(blobs).names == Checkpoint.open(original).names


def test_links_in_a_circle_are_an_error(tmp_path: Path) -> None:
    KINDS["loop"](tmp_path / "model")
    with pytest.raises(CheckpointUnreadableError, match="cannot read the folder"):
        inputs.open_model(tmp_path / "model")


def test_index_with_a_name_in_two_forms_is_refused(files: dict[str, bytes]) -> None:
    index = json.loads(files[INDEX])
    index["weight_map"]["model.norm.weight"] = SHARD
    for headers in ({}, files):
        changed = {**headers, CONFIG: files[CONFIG], INDEX: json.dumps(index).encode()}
        with pytest.raises(CheckpointUnreadableError, match="both with and without"):
            inspect_files(changed)


@pytest.mark.parametrize("name", ["a\x1b[31m.safetensors", "a\n.safetensors", b"\xff.safetensors"])
def test_control_characters_in_a_file_name_are_refused(card: Path, name: str | bytes) -> None:
    shutil.copyfile(card / SHARD, card / os.fsdecode(name))
    (card / INDEX).unlink()
    with pytest.raises(CheckpointUnreadableError, match="printable"):
        Checkpoint.open(card)


MANY = 100_000


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"ignore": [rf"re:.*\.layers\.{n}\..*" for n in range(MANY)]}, True),
        ({"ignore": [f"model.layers.{n}.x" for n in range(MANY)]}, False),
        (
            {"config_groups": {"g": {"targets": [f"re:x{n}" for n in range(MANY)], "weights": {}}}},
            True,
        ),
        (
            {"config_groups": {"g": {"targets": [f"x{n}" for n in range(MANY)], "weights": {}}}},
            False,
        ),
        (
            {"config_groups": {f"g{n}": {"targets": ["x"], "weights": {}} for n in range(MANY)}},
            True,
        ),
        ({"quant_method": "fp8", "config_groups": None, "ignore": ["*.*x*"] * MANY}, True),
        ({"quant_method": "fp8", "config_groups": None, "ignore": ["[a-" * MANY]}, True),
    ],
    ids=["ignored patterns", "ignored names", "patterns", "names", "groups", "wildcards", "long"],
)
def test_many_rules_take_seconds(
    files: dict[str, bytes], change: dict[str, Any], *, refused: bool
) -> None:
    config = json.loads(files[CONFIG])
    config["quantization_config"] |= change
    start = time.process_time()
    try:
        inspect_files({**files, CONFIG: json.dumps(config).encode()})
    except CheckpointUnreadableError:
        assert refused
    else:
        assert not refused
    assert time.process_time() - start < 20


def test_many_unknown_names_take_seconds(files: dict[str, bytes]) -> None:
    """One of another library, and 60,000 of none."""
    names = ["model.layers.0.self_attn.x", *(f"x.{n}" for n in range(60_000))]
    row = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(names, row)).encode()
    start = time.process_time()
    report = inspect_files(
        {CONFIG: files[CONFIG], "model.safetensors": len(header).to_bytes(8, "little") + header}
    )
    found = {finding.title: finding.what for finding in report.findings}
    assert "60000 tensors" in found["tensors that the model does not have"]
    assert time.process_time() - start < 20


@pytest.mark.parametrize("value", ["x" * 1_000_000, "re:(" + "x" * 60_000], ids=range(2))
@pytest.mark.parametrize(
    "path",
    [
        ("model_type",), ("quantization_config", "quant_method"),
        ("quantization_config", "format"), ("quantization_config", "scale_fmt"),
        ("quantization_config", "ignore", 0),
        ("quantization_config", "config_groups", "group_0", "targets", 0),
        ("quantization_config", "config_groups", "group_0", "input_activations", "dynamic"),
    ],
    ids=str,
)  # fmt: skip
def test_words_of_a_config_are_shown_in_part(
    files: dict[str, bytes], path: tuple[Any, ...], value: str
) -> None:
    config = _edited(json.loads(files[CONFIG]), path, value)
    try:
        told = inspect_files({**files, CONFIG: json.dumps(config).encode()}).model_dump_json()
    except CheckpointUnreadableError as error:
        told = str(error)
    assert len(told) < 50_000


@pytest.mark.parametrize(
    "row", [{"dtype": "x" * 1_000_000}, {"shape": [1 << 62] * 300_000}], ids=["dtype", "shape"]
)
def test_header_of_absurd_fields_is_refused(files: dict[str, bytes], row: dict[str, Any]) -> None:
    whole = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({"a": {**whole, **row}}).encode()
    start = time.process_time()
    with pytest.raises(CheckpointUnreadableError) as error:
        inspect_files({**files, SHARD: len(header).to_bytes(8, "little") + header})
    assert len(str(error.value)) < 2000
    assert time.process_time() - start < 20


def test_names_are_short(files: dict[str, bytes]) -> None:
    """A message never shows megabytes of one."""
    index = json.loads(files[INDEX])
    index["weight_map"]["x" * 100_000] = SHARD
    with pytest.raises(CheckpointUnreadableError) as error:
        inspect_files({**files, INDEX: json.dumps(index).encode()})
    assert len(str(error.value)) < 2000
    header = json.dumps({"x" * 100_000: {}}).encode()
    shard = len(header).to_bytes(8, "little") + header
    with pytest.raises(CheckpointUnreadableError) as error:
        inspect_files({**files, SHARD: shard})
    assert len(str(error.value)) < 2000


# Texts in place of any value: what readers of JSON disagree on, or stop at.
ODD = [
    "NaN", "-Infinity", "1e999", "9" * 5000, "-0", '"\\ud800"', '{"a": 1, "a": 2}', "[" * 100_000,
    '{"a":' * 50_000, '"\\u0000"', "null", "true", "[]", "{}", '""', "1.0", "\ufeff", "'a'",
]  # fmt: skip


def _positions(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    rows: Any = value.items() if isinstance(value, dict) else ()
    rows = enumerate(value) if isinstance(value, list) else rows
    for key, inner in rows:
        yield from _positions(inner, (*path, key))


def _edited(value: Any, path: tuple[Any, ...], mark: str) -> Any:
    if not path:
        return mark
    copy = value.copy()
    copy[path[0]] = _edited(value[path[0]], path[1:], mark)
    return copy


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    data=st.data(),
    name=st.sampled_from([CONFIG, INDEX, SHARD, "hf_quant_config.json", "manifest.json"]),
    odd=st.sampled_from(ODD) | st.just(""),
)
def test_odd_text_at_any_place_is_a_finding_or_an_error(
    data: st.DataObject, name: str, odd: str, files: dict[str, bytes]
) -> None:
    """Also a key that is missing: the empty text."""
    rows = {n: {"file": SHARD, "dtype": "BF16", "shape": [1], "sha256": ""} for n in ("a", "b")}
    quantization = json.loads(files[CONFIG])["quantization_config"]
    documents: dict[str, Any] = {
        CONFIG: json.loads(files[CONFIG]),
        INDEX: json.loads(files[INDEX]),
        "hf_quant_config.json": quantization,
        "manifest.json": {"tensors": rows},
    }
    size = int.from_bytes(files[SHARD][:8], "little")
    document = documents.get(name) or json.loads(files[SHARD][8 : 8 + size])
    path = data.draw(st.sampled_from(sorted(_positions(document), key=str)[:400]))
    if odd:
        text = json.dumps(_edited(document, path, "@@")).replace('"@@"', odd)
    elif path:
        inner = document = json.loads(json.dumps(document))
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        text = json.dumps(document)
    else:
        text = ""
    content = text.encode("utf-8", "surrogatepass")
    if name == SHARD:
        content = len(content).to_bytes(8, "little") + content + files[SHARD][8 + size :]
    changed = {**files, name: content}
    if name == "hf_quant_config.json":
        config = json.loads(files[CONFIG])
        del config["quantization_config"]
        changed[CONFIG] = json.dumps(config).encode()
    try:
        report = inspect_files(changed)
    except ForgeError as error:
        assert error.exit_code == UNREADABLE
    else:
        report.model_dump_json()
        with redirect_stdout(io.StringIO()):
            show(report, modules=True)


class Zeros(Folder):
    """A folder whose files are zeros; ``most`` is the longest piece that was read at once."""

    most = 0

    def read(self, name: str, begin: int, end: int) -> bytearray:
        Zeros.most = max(Zeros.most, end - begin)
        return bytearray(end - begin)


def test_scalars_far_apart_are_not_read_in_one_go(card: Path) -> None:
    profile = Profile.open(card)
    example = next(iter(profile.tensors.values()))
    names = [f"layers.0.ffn.experts.{n}.w1.weight_scale_2" for n in range(2000)]
    tensors = {
        name: replace(
            example, name=name, dtype="F32", shape=(), begin=n * 60_000, end=n * 60_000 + 4
        )
        for n, name in enumerate(names)
    }
    scalars = read_scalars(replace(profile, source=Zeros(card), tensors=tensors))
    assert scalars == dict.fromkeys(names, 0.0)
    assert Zeros.most <= 1 << 24


@pytest.mark.parametrize("shape", [(4, 100), (0, 128), (4, 0), (1, 1)])
@pytest.mark.parametrize("kind", [kind for kind in PIECES if kind is not Format.PLAIN])
def test_weight_of_any_shape_is_compared(card: Path, kind: Format, shape: tuple[int, int]) -> None:
    profile, name = Profile.open(card), "layers.0.attn.wq_b.weight"
    example = profile.tensors["norm.weight"]

    def zeros(spec: TensorSpec, dtype: str) -> StoredTensor:
        tensor = replace(example, name=spec.name, dtype=dtype, shape=spec.shape)
        return replace(tensor, source=Zeros(card), begin=0, end=tensor.size)

    weight = TensorSpec(name=name, dtype="BF16", shape=shape)
    stored = [zeros(spec, spec.dtype) for spec in stored_as(weight, kind)]

    def of(*tensors: StoredTensor) -> Profile:
        names = {tensor.name: tensor.shard for tensor in tensors}
        return replace(profile, names=names, tensors={tensor.name: tensor for tensor in tensors})

    rows, _ = compare(of(*stored), of(zeros(weight, "BF16")))
    assert [row.format for row in rows] == [kind]


@pytest.mark.parametrize("output", ["", "[]", "{}", '{"a": []}', '{"a": 1}', "[" * 100_000])
def test_answer_of_any_text_is_an_error(output: str) -> None:
    with pytest.raises(DryLoadError):
        read_answers(output, "here", ["a"])


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop"])
def test_conversations_of_any_kind_are_an_error(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "x.jsonl")
    with pytest.raises(RecipeError):
        read_conversations(tmp_path / "x.jsonl", 1)


ODD_DESCRIPTIONS = [
    "nonsense", "[]", "{}", "[" * 100_000, '{"id": 1}', '{"id": "a/b", "siblings": 1}',
    '{"id": "a/b", "sha": null, "siblings": [{"rfilename": "config.json", "size": "big"}]}',
    '{"id": "a/b", "sha": 1, "siblings": [{"rfilename": "config.json", "size": -1}]}',
    '{"id": "a/b", "sha": "c", "siblings": [{"rfilename": "a\\u001b.json", "size": 9}]}',
    '{"id": "a/b", "sha": "c", "siblings": [{"rfilename": "config.json", "size": 1e99}]}',
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_DESCRIPTIONS)
def test_hub_of_any_answer_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub = HubServer(description=text.encode())
    with hub.running():
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises((CheckpointUnreadableError, HubUnreachableError)):
            Checkpoint.open("owner/name")


def test_hub_that_sends_more_than_was_asked_for_is_cut_off(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = HubServer(files={**files, "big.bin": bytes(1 << 26)}, ranges=False)
    with hub.running():
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        source = find_source("owner/name")
        assert source.read("big.bin", 10, 20) == bytes(10)
        assert hub.served < 1 << 25


TRANSFORMERS = """
class PreTrainedTokenizerFast:
    chat_template = "a template"

    @classmethod
    def from_pretrained(cls, model):
        return cls()

    def apply_chat_template(self, row, chat_template, tokenize):
        {body}
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("while True: pass", "more than 2 s of CPU time"),
        ("return 'x' * (1 << 35)", "MemoryError"),
        ("import os; os.abort()", "exit code -6"),
    ],
    ids=["endless", "endless text", "crash"],
)
def test_chat_template_that_does_not_end_well_is_refused(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformers.py").write_text(TRANSFORMERS.format(body=body))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(inputs, "LIMIT_S", 2)
    with pytest.raises(ModelInputError, match=message) as caught:
        inputs.tokenize([[{"role": "user", "content": "hello"}]], 10, tmp_path)
    assert caught.value.where == str(tmp_path)
    assert "take tokenizer.json" in caught.value.remedy


def test_headers_of_many_shards_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    header = b"{}".ljust(600)
    shard = len(header).to_bytes(8, "little") + header
    shards = {f"model-{number}.safetensors": shard for number in range(3)}
    assert Checkpoint.open(Files({CONFIG: b"{}", **shards})).tensors == {}
    monkeypatch.setattr(checkpoint_module, "MAX_HEADERS", 2 * len(header))
    with pytest.raises(CheckpointUnreadableError, match="headers of all shards have more than"):
        Checkpoint.open(Files({CONFIG: b"{}", **shards}))
    del shards["model-2.safetensors"]
    assert Checkpoint.open(Files({CONFIG: b"{}", **shards})).tensors == {}
