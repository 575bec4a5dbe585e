"""transformers drops the MTP blocks: silently as released, said with the patch, dropped still."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from vllm_forge.checkpoints.architecture import draft_tensors
from vllm_forge.checkpoints.checkpoint import Checkpoint, Folder
from vllm_forge.checkpoints.quantize.environment import SERIES
from vllm_forge.checkpoints.tensors import read_header
from vllm_forge.patches import read_series

# Loads a model with the modeling file given as text, in place of the installed one.
SCRIPT = """
import importlib.util, sys
name = "transformers.models.deepseek_v4.modeling_deepseek_v4"
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
_, info = module.DeepseekV4ForCausalLM.from_pretrained(sys.argv[2], output_loading_info=True)
print("\\n".join(sorted(info["unexpected_keys"])))
"""


def saved_names(folder: Path) -> set[str]:
    source = Folder(folder)
    shards = [name for name in source.sizes if name.endswith(".safetensors")]
    return {tensor.name for shard in shards for tensor in read_header(source, shard)}


def reported_names(folder: Path) -> set[str]:
    """The MTP tensors' names as transformers reports them: after its renaming, experts merged."""
    mapping = get_checkpoint_conversion_mapping("deepseek_v4")
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    names = [tensor.name for tensor in draft_tensors(Checkpoint.open(folder).config)]
    return {rename_source_key(name, renamings, converters)[0] for name in names}


def test_load_report_names_every_mtp_tensor(bf16: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(bf16, output_loading_info=True)
    assert info["unexpected_keys"] == reported_names(bf16)
    assert len(info["unexpected_keys"]) == 29 + 2
    assert info["missing_keys"] == set()
    del model


def test_without_the_patch_nothing_is_said(bf16: Path, root: Path, tmp_path: Path) -> None:
    """The released file, by taking the patch out of the installed one."""
    (patch,) = read_series(root / SERIES)
    target = tmp_path / "src" / "transformers" / "models" / "deepseek_v4"
    target.mkdir(parents=True)
    for path in patch.files:
        shutil.copy(Path(modeling.__file__).with_name(Path(path).name), target)
    subprocess.run(
        ["git", "apply", "--reverse", "-"], input=patch.diff, text=True, cwd=tmp_path, check=True
    )
    released = target / "modeling_deepseek_v4.py"
    assert r'[r"(^|\.)mtp\..*"]' in released.read_text()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(released), str(bf16)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []
    assert "mtp" not in done.stderr


def test_saying_so_does_not_keep_them(bf16: Path, tmp_path: Path) -> None:
    """The empty list alone is no remedy: what is saved has no mtp.*; bytes have to pass by."""
    model = AutoModelForCausalLM.from_pretrained(bf16, dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    saved = saved_names(tmp_path / "saved")
    assert saved
    assert not [name for name in saved if "mtp" in name]


def test_a_save_does_not_give_back_the_names_that_were_loaded(bf16: Path, tmp_path: Path) -> None:
    """Nor is the rest upstream's: ``attn.kv_norm`` comes back as ``attn.norm``.

    Why the quantizer renames nothing itself: it keeps the names that the model came with.
    """
    model = AutoModelForCausalLM.from_pretrained(bf16, dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    saved = saved_names(tmp_path / "saved")
    upstream = {n for n in Checkpoint.open(bf16).tensors if not n.startswith("mtp.")}
    lost = upstream - {name.removeprefix("model.") for name in saved}
    assert "layers.0.attn.kv_norm.weight" in lost
    assert transformers.__version__.startswith(SERIES.name)
