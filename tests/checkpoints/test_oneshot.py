"""A layer at a time gives the very tensors of llm-compressor's oneshot on the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from compressed_tensors.compressors import ModelCompressor
from llmcompressor import oneshot
from llmcompressor.modeling.moe.conversion_mappings import get_linearize_load_mappings
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import DeepseekV4Config
from transformers.core_model_loading import rename_source_key
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

from vllm_forge.checkpoints.checkpoint import Checkpoint, Folder
from vllm_forge.checkpoints.quantize.calibrate import (
    LayerQuantizer,
    load_tensor,
    scheme_of,
    tensor_bytes,
)
from vllm_forge.checkpoints.quantize.inputs import (
    SHIPPED,
    Calibration,
    load_recipe,
    open_model,
    read_conversations,
    tokenize,
)
from vllm_forge.checkpoints.quantize.quantizer import Hidden, Job, quantize, token_bytes
from vllm_forge.checkpoints.tensors import in_memory, read_header, write_shard

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.checkpoints.tensors import StoredTensor, TensorToWrite

SAMPLES = 6


def whole_model(source: Checkpoint) -> DeepseekV4ForCausalLM:
    """The model in the checkpoint's own dtypes.

    from_pretrained keeps the norms in FP32, and the BF16 layers behind them then refuse their
    input (transformers 5.17.0, DeepseekV4RMSNorm and _keep_in_fp32_modules_strict).
    """
    config = DeepseekV4Config(**source.config)
    config._attn_implementation = "eager"
    config.dtype = torch.bfloat16
    config._name_or_path = str(source.local.path)
    model = DeepseekV4ForCausalLM(config)
    linearize_moe(model)
    _, renamings, _ = get_linearize_load_mappings("deepseek_v4")
    state = {}
    for name, tensor in source.tensors.items():
        if not name.startswith("mtp."):
            renamed = rename_source_key(name, renamings, [])[0]
            prefix = "" if renamed.startswith("lm_head") else "model."
            state[f"{prefix}{renamed}"] = load_tensor(tensor)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def test_streamed_layers_equal_the_whole_model(bf16: Path, tmp_path: Path) -> None:
    source, recipe = open_model(bf16), load_recipe("nvfp4-fp8-mtp")
    rows = read_conversations(SHIPPED, SAMPLES)
    tokens = tokenize(rows, recipe.tokens, bf16)
    engine = LayerQuantizer(source.config, recipe, "cpu")
    calibration = Calibration(source="test", tokens=tokens)
    job = Job(source=source, recipe=recipe, calibration=calibration, engine=engine)
    quantize(job, tmp_path / "streamed")
    streamed = Checkpoint.open(tmp_path / "streamed").tensors

    model = whole_model(source)
    groups = {f"group_{n}": scheme_of(g, g.calibrate) for n, g in enumerate(recipe.group)}
    batches = [{"input_ids": torch.tensor([list(row)])} for row in tokens]
    oneshot(
        model=model,
        recipe=[QuantizationModifier(config_groups=groups, ignore=["lm_head"])],
        dataset=torch.utils.data.DataLoader(batches, batch_size=None),
        pipeline="basic",
    )
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    _, renamings, _ = get_linearize_load_mappings("deepseek_v4")
    state = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    compared = 0
    for name in source.tensors:
        if recipe.group_of(name) is None:
            continue
        module = name.removesuffix(".weight")
        theirs = rename_source_key(name, renamings, [])[0].removesuffix(".weight")
        for leaf in [n.rpartition(".")[2] for n in streamed if n.rpartition(".")[0] == module]:
            value = state[f"{theirs}.{leaf}"]
            ours = streamed[f"{module}.{leaf}"]
            if ours.dtype == "F32":
                value = value.float()  # block scales and global scales: wider, or (1,) -> ()
            assert tensor_bytes(value) == bytes(ours.read()), f"{module}.{leaf}"
            compared += 1
    assert compared == 3 * (5 * 2 + 24 * 4)


def test_weights_in_fp32_give_the_same_tensors(bf16: Path, tmp_path: Path) -> None:
    """Some conversions to BF16 leave FP32; open_model takes both."""
    source, recipe = open_model(bf16), load_recipe("nvfp4-fp8-mtp")
    stored = {n: t for n, t in source.tensors.items() if n.startswith("layers.0.")}
    stored["embed.weight"] = source.tensors["embed.weight"]
    items = [_widened(tensor) for tensor in stored.values()]
    write_shard(tmp_path / "wide.safetensors", items)
    wide = {t.name: t for t in read_header(Folder(tmp_path), "wide.safetensors")}
    engine, width = LayerQuantizer(source.config, recipe, "cpu"), token_bytes(source.config)
    made = []
    for tensors in (stored, wide):
        states, after = (
            Hidden(path=tmp_path / name, tokens=((0, 5, 9),), token_bytes=width)
            for name in ("in", "out")
        )
        engine.embed(tensors["embed.weight"], states)
        layer = {n: t for n, t in tensors.items() if n.startswith("layers.0.")}
        made.append({t.name: t.data() for t in engine.layer(0, layer, states, after)})
    assert made[0] == made[1]


def _widened(tensor: StoredTensor) -> TensorToWrite:
    wide = load_tensor(tensor).float() if tensor.dtype == "BF16" else load_tensor(tensor)
    dtype = "F32" if tensor.dtype == "BF16" else tensor.dtype
    return in_memory(tensor.name, dtype, tensor.shape, tensor_bytes(wide))
