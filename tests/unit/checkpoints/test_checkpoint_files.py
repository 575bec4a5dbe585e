"""What a DeepSeek-V4 must have, the tiny one, and safetensors files as byte ranges."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from tests.support.checkpoint_engine import SMALL, tree_of
from tests.support.variants import DsparkSpec
from vllm_forge.checkpoints.architecture import (
    all_tensors,
    draft_tensors,
    dspark_tensors,
    mtp_tensors,
)
from vllm_forge.checkpoints.checkpoint import Checkpoint, Folder
from vllm_forge.checkpoints.errors import CheckpointUnreadableError, ModelInputError
from vllm_forge.checkpoints.fixtures.tiny import TinySpec, write_bf16
from vllm_forge.checkpoints.quantize.inputs import alias_names, open_model
from vllm_forge.checkpoints.tensors import (
    DTYPE_BYTES,
    INDEX,
    copy_of,
    in_memory,
    read_header,
    write_shard,
)

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.checkpoints.tensors import StoredTensor

# deepseek-ai/DeepSeek-V4-Flash, config.json: what names and shapes follow from.
FLASH: dict[str, Any] = {
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
    "hc_mult": 4,
    "head_dim": 512,
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "vocab_size": 129280,
}


def read_shard(path: Path) -> list[StoredTensor]:
    return read_header(Folder(path.parent), path.name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bf16"
    write_bf16(folder, SMALL)
    return folder


class TestInventory:
    def test_the_published_counts_come_out(self) -> None:
        """Of the card's family: 797 MTP names before aliases, 417 FP32 tensors, 43 x 256 x 3."""
        assert len(list(mtp_tensors(FLASH))) == 797
        tensors = list(all_tensors(FLASH))
        assert Counter(tensor.dtype for tensor in tensors)["F32"] == 417
        experts = [t for t in tensors if t.name.startswith("layers.") and ".experts." in t.name]
        assert len(experts) == 43 * 256 * 3
        assert len({tensor.name for tensor in tensors}) == len(tensors)

    def test_compressors_that_overlap_have_two_series(self) -> None:
        """transformers 5.17.0, DeepseekV4CSACompressor and DeepseekV4HCACompressor."""
        shapes = {tensor.name: tensor.shape for tensor in all_tensors(FLASH)}
        assert shapes["layers.2.attn.compressor.wkv.weight"] == (1024, 4096)
        assert shapes["layers.2.attn.compressor.ape"] == (4, 1024)
        assert shapes["layers.2.attn.indexer.compressor.wgate.weight"] == (256, 4096)
        assert shapes["layers.3.attn.compressor.wkv.weight"] == (512, 4096)
        assert shapes["layers.3.attn.compressor.ape"] == (128, 512)

    def test_dspark_has_4705_tensors_once_it_is_quantized(self) -> None:
        """Each FP8 or MXFP4 weight has one scale: experts, five of attention, three shared."""
        names = [t.name for t in dspark_tensors({**FLASH, "dspark_target_layer_ids": [40, 41, 42],
                                                 "dspark_markov_rank": 256})]  # fmt: skip
        scaled = [
            n for n in names
            if (".experts." in n or "shared_experts" in n or ".attn.w" in n or "main_proj" in n)
        ]  # fmt: skip
        assert len(names) + len(scaled) == 4705

    def test_the_config_says_which_drafter(self) -> None:
        spec = DsparkSpec()
        names = {tensor.name for tensor in draft_tensors(spec.config())}
        assert "mtp.2.markov_head.markov_w1.weight" in names
        assert not any("enorm" in name for name in names)


class TestTiny:
    def test_it_is_complete_and_small(self, tmp_path: Path) -> None:
        write_bf16(tmp_path / "bf16", TinySpec())
        checkpoint = open_model(tmp_path / "bf16")
        expected = {t.name: (t.dtype, t.shape) for t in all_tensors(checkpoint.config)}
        assert {t.name: (t.dtype, t.shape) for t in checkpoint.tensors.values()} == expected
        assert 20e6 < sum(tensor.size for tensor in checkpoint.tensors.values()) < 80e6
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (tmp_path / "bf16" / name).stat().st_size > 0

    def test_the_same_spec_gives_the_same_bytes(self, model: Path, tmp_path: Path) -> None:
        write_bf16(tmp_path / "again", SMALL)
        assert tree_of(tmp_path / "again") == tree_of(model)

    def test_another_seed_gives_other_weights(self, model: Path, tmp_path: Path) -> None:
        write_bf16(tmp_path / "other", SMALL.__class__(**{**SMALL.__dict__, "seed": 7}))
        ours, theirs = Checkpoint.open(model), Checkpoint.open(tmp_path / "other")
        same = [
            name for name, tensor in ours.tensors.items()
            if tensor.read() == theirs.tensors[name].read()
        ]  # fmt: skip
        assert same == []

    def test_fp32_tensors_would_lose_by_a_downcast(self, model: Path) -> None:
        wide = [t for t in Checkpoint.open(model).tensors.values() if t.dtype == "F32"]
        assert wide
        for tensor in wide:
            data = tensor.read()
            assert any(data[0::4]) or any(data[1::4]), tensor.name

    def test_weights_are_about_normal(self, model: Path) -> None:
        """Standard deviation 1/sqrt(columns), within a quarter; both signs alike."""
        tensor = Checkpoint.open(model).tensors["layers.0.attn.wq_b.weight"]
        data = tensor.read()
        values = [int.from_bytes(data[at : at + 2], "little") for at in range(0, len(data), 2)]
        numbers = [_bf16(value) for value in values]
        spread = (sum(x * x for x in numbers) / len(numbers)) ** 0.5
        assert 0.75 < spread * tensor.shape[-1] ** 0.5 < 1.75
        assert 0.45 < sum(x > 0 for x in numbers) / len(numbers) < 0.55


def _bf16(bits: int) -> float:
    sign = -1.0 if bits >> 15 else 1.0
    exponent, mantissa = (bits >> 7) & 0xFF, bits & 0x7F
    return sign * (1 + mantissa / 128) * 2.0 ** (exponent - 127)


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text("abc.0", min_size=1, max_size=8),
    st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), SHAPES),
    max_size=6,
)


class TestShards:
    @given(tensors=TENSORS, seed=st.binary(min_size=1, max_size=4))
    def test_what_is_written_is_read_back_by_us_and_by_the_library(
        self, tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any], seed: bytes
    ) -> None:
        path = tmp_path_factory.mktemp("shard") / "x.safetensors"
        items = []
        for number, (name, (dtype, shape)) in enumerate(tensors.items()):
            size = DTYPE_BYTES[dtype]
            for extent in shape:
                size *= extent
            data = (seed * (size + 1))[number % len(seed) :][:size]
            items.append(in_memory(name, dtype, shape, data))
        written = write_shard(path, items)
        assert written.keys() == tensors.keys()
        ours = {t.name: (t.dtype, t.shape, bytes(t.read())) for t in read_shard(path)}
        deserialize: Any = safetensors.deserialize
        theirs = dict(deserialize(path.read_bytes()))
        for item in items:
            data = b"".join(item.chunks())
            assert ours[item.name] == (item.dtype, item.shape, data)
            assert bytes(theirs[item.name]["data"]) == data
            assert tuple(theirs[item.name]["shape"]) == item.shape

    def test_a_copy_streams_the_same_bytes(self, model: Path, tmp_path: Path) -> None:
        tensor = Checkpoint.open(model).tensors["mtp.0.e_proj.weight"]
        write_shard(tmp_path / "x.safetensors", [copy_of(tensor, "another.name")])
        (copied,) = read_shard(tmp_path / "x.safetensors")
        assert (copied.name, copied.read()) == ("another.name", tensor.read())

    def test_a_tensor_of_the_wrong_size_is_not_written(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="3 bytes are not 4"):
            write_shard(tmp_path / "x.safetensors", [in_memory("a", "F32", (1,), b"abc")])
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "a header of 0 bytes"),
            (b"\xff" * 16, "a header of"),
            (b"\x02\0\0\0\0\0\0\0[]", "not a whole safetensors file"),
            (b"\x05\0\0\0\0\0\0\0{nope", "not a whole safetensors file"),
            (b"\x02\0\0\0\0\0\0\0{}more", "describes 10 bytes, the file has 14"),
        ],
    )
    def test_what_is_not_safetensors_is_refused(
        self, tmp_path: Path, content: bytes, said: str
    ) -> None:
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(CheckpointUnreadableError, match=said):
            read_shard(tmp_path / "x.safetensors")

    def test_a_cut_off_download_is_refused(self, model: Path, tmp_path: Path) -> None:
        content = (model / "model-00001-of-00004.safetensors").read_bytes()
        (tmp_path / "x.safetensors").write_bytes(content[:-1])
        with pytest.raises(CheckpointUnreadableError, match="the file has"):
            read_shard(tmp_path / "x.safetensors")

    def test_ranges_may_not_overlap(self, tmp_path: Path) -> None:
        rows = {name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} for name in "ab"}
        text = json.dumps(rows).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"z")
        with pytest.raises(CheckpointUnreadableError, match="does not follow"):
            read_shard(path)


class TestSource:
    def test_a_complete_model_needs_aliases(self, model: Path) -> None:
        assert alias_names(open_model(model)) == {
            "mtp.0.emb.tok_emb.weight": "embed.weight",
            "mtp.0.head.weight": "head.weight",
        }

    def test_all_that_is_wrong_is_said(self, model: Path, tmp_path: Path) -> None:
        broken = _copy(model, tmp_path)
        path = broken / "model-00004-of-00004.safetensors"
        kept = [tensor for tensor in read_shard(path) if "enorm" not in tensor.name]
        items = [copy_of(tensor, tensor.name.replace("hnorm", "hmm")) for tensor in kept]
        items = [
            in_memory(i.name, "BF16", i.shape, b"\0\0" * 3) if i.name.endswith("attn_scale") else i
            for i in items
        ]
        write_shard(tmp_path / "new.safetensors", items)
        (tmp_path / "new.safetensors").replace(path)
        index = json.loads((broken / INDEX).read_text())
        index["weight_map"] = {
            n.replace("hnorm", "hmm"): f for n, f in index["weight_map"].items() if "enorm" not in n
        }
        (broken / INDEX).write_text(json.dumps(index))
        with pytest.raises(ModelInputError) as caught:
            open_model(broken)
        for said in (
            "mtp.0.enorm.weight is missing",
            "mtp.0.hnorm.weight is missing",
            "mtp.0.hc_attn_scale is BF16, not F32",
            "mtp.0.hmm.weight is not a tensor of this model",
        ):
            assert said in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"model_type": "llama"}, "model_type is 'llama'"),
            ({"quantization_config": {}}, "quantized already"),
            ({"hidden_size": None}, "hidden_size: Field required"),
            ({"hidden_size": 256}, "not the tensors that config.json describes"),
        ],
    )
    def test_another_model_is_refused(
        self, model: Path, tmp_path: Path, change: dict[str, Any], said: str
    ) -> None:
        broken = _copy(model, tmp_path)
        config = json.loads((broken / "config.json").read_text())
        config.update(change)
        for key, value in change.items():
            if value is None:
                del config[key]
        (broken / "config.json").write_text(json.dumps(config))
        with pytest.raises((CheckpointUnreadableError, ModelInputError), match=said):
            open_model(broken)

    @pytest.mark.parametrize("name", ["config.json", "model-00002-of-00004.safetensors"])
    def test_a_missing_file_is_named(self, model: Path, tmp_path: Path, name: str) -> None:
        broken = _copy(model, tmp_path)
        (broken / name).unlink()
        with pytest.raises((CheckpointUnreadableError, ModelInputError), match=f"missing {name}"):
            open_model(broken)

    def test_git_lfs_pointer_is_refused(self, model: Path, tmp_path: Path) -> None:
        broken = _copy(model, tmp_path)
        (broken / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(CheckpointUnreadableError, match="is a Git LFS pointer"):
            open_model(broken)

    def test_the_index_must_be_the_files(self, model: Path, tmp_path: Path) -> None:
        broken = _copy(model, tmp_path)
        index = json.loads((broken / INDEX).read_text())
        index["weight_map"]["ghost"] = "model-00001-of-00004.safetensors"
        (broken / INDEX).write_text(json.dumps(index))
        with pytest.raises(ModelInputError, match="1 tensors are not where it says"):
            open_model(broken)


def _copy(model: Path, folder: Path) -> Path:
    target = folder / "copy"
    target.mkdir()
    for path in model.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
