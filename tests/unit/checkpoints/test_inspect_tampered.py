"""Tampered checkpoints: a verdict or an error of ours for each, and never a pass for a lie."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.layouts import layout
from tests.support.memory import inspect_files
from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.errors import (
    CheckpointDepartsError,
    CheckpointRefusedError,
    CheckpointUnreadableError,
)
from vllm_forge.checkpoints.inspect.manifest import RECORD
from vllm_forge.checkpoints.tensors import copy_of, write_shard
from vllm_forge.cli import main
from vllm_forge.errors import ForgeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[3]
SERVES, REFUSED = 0, CheckpointRefusedError.exit_code
DEPARTS = CheckpointDepartsError.exit_code
UNREADABLE = CheckpointUnreadableError.exit_code
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SHARD, OTHER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DEEP = b"[" * 200_000
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = layout(tmp_path_factory.mktemp("tampered"), "card")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _without(*names: str) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        for name in names:
            del files[name]

    return change


def _exit(files: dict[str, bytes]) -> tuple[int, str]:
    """What the command would leave with, and why; by rules, on the line 0.26."""
    try:
        report = inspect_files(files)
    except ForgeError as error:
        return error.exit_code, str(error)
    told = " ".join(f"{finding.title}: {finding.what}" for finding in report.findings)
    refusal = report.error("0.26")
    return refusal.exit_code if refusal else SERVES, told


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header, data[8 + length :]


def _shard(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _edited(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, bytes]], None]:
    """A JSON file with a change in place; what the change returns, if that is not None."""

    def apply(files: dict[str, bytes]) -> None:
        content = json.loads(files[name])
        found = change(content)
        files[name] = json.dumps(content if found is None else found).encode()

    return apply


def _config(path: str, value: Any) -> Callable[[dict[str, bytes]], None]:
    def change(config: dict[str, Any]) -> None:
        *parents, leaf = path.split(".")
        for key in parents:
            config = config[key]
        config[leaf] = value

    return _edited(CONFIG, change)


def _row(**change: Any) -> Callable[[dict[str, bytes]], None]:
    """The first tensor of a shard, told otherwise."""

    def apply(files: dict[str, bytes]) -> None:
        header, data = _header(files[SHARD])
        next(row for name, row in header.items() if name[:2] != "__").update(change)
        files[SHARD] = _shard(header, data)

    return apply


def _raw(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.update({name: data})


def _cut(size: int) -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.update({SHARD: files[SHARD][:size]})


def _weight_map(**rows: Any) -> Callable[[dict[str, bytes]], None]:
    return _edited(INDEX, lambda index: index["weight_map"].update(rows))


def _twice_in_a_header(files: dict[str, bytes]) -> None:
    header, data = _header(files[SHARD])
    name = next(name for name in header if name[:2] != "__")
    text = json.dumps(header)[:-1] + "," + json.dumps({name: header[name]})[1:]
    files[SHARD] = _shard(text.encode(), data)


def _in_two_shards(files: dict[str, bytes]) -> None:
    files["model-00003.safetensors"] = files[SHARD]
    _weight_map(**{"another.weight": "model-00003.safetensors"})(files)


GROUP = "quantization_config.config_groups.group_0"
# What was done -> how; exit code; a word of the reason.
TAMPERED: dict[str, tuple[Callable[[dict[str, bytes]], Any], int, str]] = {
    "no config": (lambda files: files.pop(CONFIG), UNREADABLE, "missing config.json"),
    "config is not UTF-8": (_raw(CONFIG, b"\xff\xfe{}"), UNREADABLE, "utf-8"),
    "config is empty": (_raw(CONFIG, b""), UNREADABLE, "not JSON"),
    "config is a list": (_raw(CONFIG, b"[]"), UNREADABLE, "not a JSON object"),
    "config is deep": (_raw(CONFIG, DEEP), UNREADABLE, "nested"),
    "a key twice": (_raw(CONFIG, b'{"a":1,"a":2}'), UNREADABLE, "duplicate key"),
    "index is deep": (_raw(INDEX, DEEP), UNREADABLE, "nested"),
    "index without a map": (_edited(INDEX, lambda i: {}), UNREADABLE, "no weight_map"),
    "index to elsewhere": (_weight_map(a="../../x.safetensors"), UNREADABLE, "own folder"),
    "index to a number": (_weight_map(a=1), UNREADABLE, "no weight_map"),
    "index to no shard": (_weight_map(a="gone.safetensors"), REFUSED, "shards are missing"),
    "index has a ghost": (_weight_map(ghost=SHARD), DEPARTS, "ghost"),
    "index lacks one": (
        _edited(INDEX, lambda i: i["weight_map"].pop("norm.weight") and None), DEPARTS, "norm",
    ),
    "index sums are words": (_edited(INDEX, lambda i: i.update(metadata=[1])), SERVES, ""),
    "a shard is gone": (lambda files: files.pop(OTHER), REFUSED, "shards are missing"),
    "a shard of a number is gone": (_without(INDEX, OTHER), REFUSED, "1 of 2 shards"),
    "a shard is empty": (_cut(0), UNREADABLE, "a header of 0 bytes"),
    "a header is cut off": (_cut(500), UNREADABLE, "a header of"),
    "data is cut off": (lambda f: f.update({SHARD: f[SHARD][:-1]}), UNREADABLE, "cut off"),
    "data is too long": (lambda f: f.update({SHARD: f[SHARD] + b"0"}), UNREADABLE, "too long"),
    "a header is deep": (_raw(SHARD, _shard(DEEP, b"")), UNREADABLE, "nested"),
    "a tensor twice": (_twice_in_a_header, UNREADABLE, "duplicate key"),
    "a tensor in two shards": (_in_two_shards, UNREADABLE, "and in"),
    "offsets before the data": (_row(data_offsets=[-8, 0]), UNREADABLE, "data_offsets"),
    "offsets beyond it": (_row(data_offsets=[1 << 40, 1 << 41]), UNREADABLE, "bytes are not"),
    "offsets are words": (_row(data_offsets=["0", "8"]), UNREADABLE, "data_offsets"),
    "a negative shape": (_row(shape=[-1, -1]), UNREADABLE, "shape"),
    "a shape of fractions": (_row(shape=[1.0]), UNREADABLE, "shape"),
    "another shape": (_row(shape=[1]), UNREADABLE, "bytes are not"),
    "another dtype": (_row(dtype="F32"), UNREADABLE, "bytes are not"),
    "another kind of number": (_row(dtype="U64"), REFUSED, "means something else"),
    "index to what vLLM does not read": (_weight_map(a="x.bin"), REFUSED, "shards are missing"),
    "index to nothing": (_weight_map(a=""), UNREADABLE, "no weight_map"),
    "index up": (_weight_map(a=".."), UNREADABLE, "no weight_map"),
    "a name for a terminal": (_weight_map(**{"a\x1b": SHARD}), UNREADABLE, "no weight_map"),
    "a rule for a terminal": (
        _config("quantization_config.ignore", ["a\n0.26: serves"]), UNREADABLE, "ignore",
    ),
    "half a character": (
        _config("quantization_config.quant_method", "\ud800"), UNREADABLE, "surrogates",
    ),
    "an unknown dtype": (_row(dtype="F4"), UNREADABLE, "'F4', known are"),
    "no dtype": (_row(dtype=["F32"]), UNREADABLE, "dtype"),
    "a method nobody knows": (
        _config("quantization_config.quant_method", "awq"), REFUSED, "'awq'; known",
    ),
    "no method": (_config("quantization_config.quant_method", None), REFUSED, "quant_method"),
    "another method": (
        _config("quantization_config.quant_method", "fp8"), REFUSED, "not in FP8 as the config",
    ),
    "no quantization": (
        _config("quantization_config", None), REFUSED, "no quantization_config",
    ),
    "quantization is a list": (_config("quantization_config", [1]), UNREADABLE, "valid dictionary"),
    "groups are a list": (
        _config("quantization_config.config_groups", []), UNREADABLE, "config_groups",
    ),
    "a group is a word": (_config(GROUP, "x"), UNREADABLE, "group_0"),
    "targets are a word": (_config(f"{GROUP}.targets", "re:.*"), UNREADABLE, "targets"),
    "a group for nothing": (_config(f"{GROUP}.targets", None), UNREADABLE, "valid list"),
    "no weights": (_config(f"{GROUP}.weights", None), UNREADABLE, "weights"),
    "an unknown argument": (_config(f"{GROUP}.weights.x", 1), UNREADABLE, "weights.x: Extra"),
    "weights are a word": (_config(f"{GROUP}.weights", "x"), UNREADABLE, "weights"),
    "inputs are a list": (_config(f"{GROUP}.input_activations", [1]), UNREADABLE, "input"),
    "an order is a list": (_config(f"{GROUP}.weights.actorder", ["x"]), UNREADABLE, "actorder"),
    "ignore is a word": (_config("quantization_config.ignore", "lm_head"), UNREADABLE, "ignore"),
    "ignore is no pattern": (
        _config("quantization_config.ignore", ["re:("]), REFUSED, "not a regular expression",
    ),
    "ignore repeats too often": (
        _config("quantization_config.ignore", ["re:a{9999999999}"]), REFUSED, "not a regular",
    ),
    "ignore is too deep": (
        _config("quantization_config.ignore", ["re:" + "(" * 9999 + ")" * 9999]), REFUSED,
        "not a regular",
    ),
    "layers are a word": (_config("num_hidden_layers", "3"), UNREADABLE, "num_hidden_layers"),
    "layers are true": (_config("num_hidden_layers", True), UNREADABLE, "num_hidden_layers"),
    "layers below none": (_config("num_hidden_layers", -1), UNREADABLE, "num_hidden_layers"),
    "a layer too many": (_config("num_hidden_layers", 4), REFUSED, "experts are missing"),
    "a layer too few": (
        _config("num_hidden_layers", 2), REFUSED, "tensors that the model does not have",
    ),
    "experts beyond memory": (_config("n_routed_experts", 10**8), UNREADABLE, "n_routed_experts"),
    "layers of experts beyond it": (
        lambda files: [_config("num_hidden_layers", 1000)(files),
                       _config("n_routed_experts", 4000)(files)], UNREADABLE, "beyond any model",
    ),
    "drafts beyond memory": (
        _config("num_nextn_predict_layers", 10**7), UNREADABLE, "num_nextn_predict_layers",
    ),
    "ratios are words": (_config("compress_ratios", ["0", "4", "128"]), UNREADABLE, "ratios"),
    "no groups": (_config("o_groups", 0), UNREADABLE, "o_groups"),
    "another width": (_config("hidden_size", 512), REFUSED, "of another shape"),
    "another vocabulary": (_config("vocab_size", 65), REFUSED, "of another shape"),
    "half a DSpark config": (_config("dspark_target_layer_ids", [1]), UNREADABLE, "dspark_markov"),
    "a record is deep": (_raw(RECORD, DEEP), DEPARTS, "cannot be read"),
    "a record of others": (_raw(RECORD, b'{"tensors":{}}'), DEPARTS, "not recorded"),
    "tokenizer is a Git LFS pointer": (
        _raw("tokenizer.json", POINTER), DEPARTS, "Git LFS pointer",
    ),
    "tokenizer is empty": (_raw("tokenizer.json", b""), DEPARTS, "tokenizer.json is not JSON"),
    "tokenizer is cut off": (_raw("tokenizer.json", b'{"model":'), DEPARTS, "not JSON"),
    "config is a Git LFS pointer": (_raw(CONFIG, POINTER), UNREADABLE, "git lfs pull"),
    "shard is a Git LFS pointer": (_raw(SHARD, POINTER), UNREADABLE, "git lfs pull"),
    "no tokenizer": (lambda files: files.pop("tokenizer.json"), SERVES, "no tokenizer"),
}  # fmt: skip


def test_what_a_missing_shard_has_is_not_missed_as_well(card: dict[str, bytes]) -> None:
    report = inspect_files({name: data for name, data in card.items() if name != OTHER})
    (found,) = report.findings
    assert "1 of 2 shards are not here" in found.what


@pytest.mark.parametrize("name", TAMPERED)
def test_a_lie_is_reported(name: str, card: dict[str, bytes]) -> None:
    change, code, words = TAMPERED[name]
    files = dict(card)
    change(files)
    found, told = _exit(files)
    assert (found, words in told) == (code, True), told


def test_the_untampered_one_passes(card: dict[str, bytes]) -> None:
    assert _exit(card)[0] == SERVES


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key in it."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    own = [(value, key) for key in keys]
    return own + [place for key in keys for place in _places(value[key])]


@given(data=st.data(), value=JSON)
def test_any_value_in_a_config_gives_a_verdict(
    data: st.DataObject, value: Any, card: dict[str, bytes]
) -> None:
    config = json.loads(card[CONFIG])
    container, key = data.draw(st.sampled_from(_places(config)))
    container[key] = value
    code, _ = _exit({**card, CONFIG: json.dumps(config).encode()})
    assert code in {SERVES, REFUSED, DEPARTS, UNREADABLE}


@given(data=st.data(), value=JSON)
def test_no_header_passes_that_says_something_else(
    data: st.DataObject, value: Any, card: dict[str, bytes]
) -> None:
    header, rest = _header(card[SHARD])
    del header["__metadata__"]
    before = deepcopy(header)
    name = data.draw(st.sampled_from(sorted(header)))
    container, key = data.draw(st.sampled_from([(header, name), *_places(header[name])]))
    container[key] = value
    code, _ = _exit({**card, SHARD: _shard(header, rest)})
    assert code in ({SERVES} if header == before else {REFUSED, DEPARTS, UNREADABLE})


@given(data=st.data(), name=st.sampled_from([CONFIG, INDEX, SHARD]), byte=st.binary(max_size=3))
def test_any_bytes_give_a_verdict(
    data: st.DataObject, name: str, byte: bytes, card: dict[str, bytes]
) -> None:
    """Bytes of a file, or of a shard's header, replaced, dropped or added."""
    content = card[name]
    at = data.draw(st.integers(0, min(len(content), 30_000)))
    gone = data.draw(st.integers(0, 3))
    code, _ = _exit({**card, name: content[:at] + byte + content[at + gone :]})
    assert code in {SERVES, REFUSED, DEPARTS, UNREADABLE}


class TestDigests:
    """manifest.json has the SHA-256 of each tensor; they are compared where that is asked for."""

    @pytest.fixture
    def recorded(self, card: dict[str, bytes], tmp_path: Path) -> Path:
        """A checkpoint of one shard with a record of it."""
        folder: Path = layout(tmp_path, "card")
        tensors = Checkpoint.open(folder).tensors
        rows = {}
        for name in (SHARD, OTHER):
            items = [copy_of(t) for t in tensors.values() if t.shard == name]
            sums = write_shard(tmp_path / "again" / name, items)
            for item in items:
                rows[item.name] = {
                    "dtype": item.dtype,
                    "shape": list(item.shape),
                    "file": name,
                    "sha256": sums[item.name],
                }
        (folder / RECORD).write_text(json.dumps({"tensors": rows}))
        return folder

    def _run(self, folder: Path, *options: str) -> int:
        return main(["checkpoint", "inspect", str(folder), "--resolve=rules", *options])

    def test_one_other_byte_is_reported(
        self, recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("VLLM_FORGE_ROOT", str(ROOT))
        assert self._run(recorded, "--digests") == SERVES
        path = recorded / SHARD
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)
        assert self._run(recorded) == SERVES
        assert self._run(recorded, "--digests") == DEPARTS
        assert "bytes are not as recorded" in capsys.readouterr().err
        (recorded / RECORD).unlink()
        assert self._run(recorded, "--digests") == UsageError.exit_code
