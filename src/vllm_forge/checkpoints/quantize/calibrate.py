"""One decoder layer through llm-compressor: real weights in, compressed tensors out.

What ``llmcompressor.oneshot`` does to a whole model, done to one layer: its session, its
QuantizationModifier, its basic pipeline, its linearized experts; and compressed-tensors' own
compressors for the bytes. QuantizationModifier only chooses scales: the forward pass that
calibrates a layer is the unquantized one, and its output is the next layer's input
(llmcompressor 0.14.0.1, pipelines/basic/pipeline.py: DisableQuantization). So a layer at a time
gives the very tensors of the whole model at once; tests/checkpoints/test_oneshot.py compares.

Needs the environment of docker/locks/quantize.txt.
"""

import copy
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any

import compressed_tensors
import llmcompressor
import torch
import transformers
from compressed_tensors.compressors.base import compress_module
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.core import create_session
from llmcompressor.modeling.moe.context import moe_calibration_context
from llmcompressor.modeling.moe.conversion_mappings import get_linearize_load_mappings
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.basic import BasicPipeline
from llmcompressor.recipe import Recipe as CompressorRecipe
from loguru import logger
from transformers import DeepseekV4Config
from transformers.core_model_loading import rename_source_key
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from vllm_forge.checkpoints.architecture import MODEL_TYPE, layer_tensors
from vllm_forge.checkpoints.errors import QuantizedOutputError
from vllm_forge.checkpoints.inspect import meta_load
from vllm_forge.checkpoints.quantize.inputs import AUTO, Group, Recipe
from vllm_forge.checkpoints.quantize.quantizer import Hidden
from vllm_forge.checkpoints.tensors import StoredTensor, TensorToWrite
from vllm_forge.errors import UsageError

DTYPES = {name: getattr(torch, dtype) for name, dtype in meta_load.DTYPES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MIXED = "mixed-precision"
# Said of a scale that nothing was observed for (llmcompressor, quantization/calibration.py).
UNOBSERVED = "without statistics"


class OneLayer(torch.nn.Module):  # type: ignore[misc]  # the tools have no types here
    """A decoder layer under its full name, which is what targets match."""

    def __init__(
        self, config: DeepseekV4Config, index: int, rotary: modeling.DeepseekV4RotaryEmbedding
    ) -> None:
        super().__init__()
        experts = LinearExperts2D.get_linear_experts_cls(modeling.DeepseekV4Experts)
        with torch.device("meta"):
            layer = modeling.DeepseekV4DecoderLayer(config, index)
            layer.mlp.experts = experts(config)
        for module in layer.modules():  # frequencies are computed, not loaded
            if hasattr(module, "rotary_emb"):
                module.rotary_emb = modeling.DeepseekV4RotaryEmbedding(config)
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleDict({str(index): layer})
        self.config, self.index = config, index
        self.rotary = [rotary]  # in a list: not a submodule
        self.sink: Callable[[bytes], object]

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> None:
        """[1, tokens, streams, hidden] in; what comes out goes to the sink."""
        collapsed = hidden_states[:, :, 0]
        positions = torch.arange(collapsed.shape[1], device=collapsed.device).unsqueeze(0)
        mask = create_sliding_window_causal_mask(
            config=self.config,
            inputs_embeds=collapsed,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        rotary = self.rotary[0]
        out = self.model.layers[str(self.index)](
            hidden_states,
            position_embeddings={
                kind: rotary(collapsed, position_ids=positions, layer_type=kind)
                for kind in ("main", "compress")
            },
            position_ids=positions,
            attention_mask=mask,
            input_ids=input_ids,
            past_key_values=None,
        )
        self.sink(tensor_bytes(out))


def _batches(hidden: Hidden, config: DeepseekV4Config) -> Iterator[dict[str, torch.Tensor]]:
    """The samples, one at a time from the disk; in place of a data loader."""
    for number, row in enumerate(hidden.tokens):
        states = torch.frombuffer(hidden.read(number), dtype=torch.bfloat16)
        shape = (1, len(row), config.hc_mult, config.hidden_size)
        yield {"hidden_states": states.view(shape), "input_ids": torch.tensor([list(row)])}


def load_tensor(stored: StoredTensor) -> torch.Tensor:
    return torch.frombuffer(stored.read(), dtype=DTYPES[stored.dtype]).view(stored.shape)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy().tobytes())


def pick_device(choice: str) -> str:
    """Torch's name of the device: the first GPU, or the CPU, where the choice is ``auto``."""
    if choice == AUTO:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=choice).cpu()  # "meta" has no numbers to give back
    except (RuntimeError, AssertionError) as error:  # unknown, not there, or not built for it
        what = f"--device {choice}: {str(error).splitlines()[0]}"
        remedy = "name one that torch finds on this host, e.g. cpu or cuda:0"
        raise UsageError(what, remedy=remedy) from None
    return choice


class LayerQuantizer:
    """Quantizes the layers of a model by its config.json and a recipe."""

    def __init__(self, config: Mapping[str, Any], recipe: Recipe, device: str) -> None:
        logger.remove()  # llm-compressor's own printing; what matters of it is raised here
        # A copy: it writes into the rope_scaling that it is given. eager: the only attention that
        # deepseek_v4 has in transformers.
        self.source, self.config = config, DeepseekV4Config(**copy.deepcopy(dict(config)))
        self.config._attn_implementation = "eager"
        self.config.dtype = torch.bfloat16
        self.recipe = recipe
        self.device = torch.device(device)
        self.rotary = modeling.DeepseekV4RotaryEmbedding(self.config).to(self.device)
        _, self.renamings, _ = get_linearize_load_mappings(MODEL_TYPE)

    @property
    def versions(self) -> dict[str, str]:
        """What the result depends on beside the inputs."""
        modules = (compressed_tensors, llmcompressor, torch, transformers)
        return {module.__name__: module.__version__ for module in modules} | {
            "device": self.device.type,
            "threads": str(torch.get_num_threads()),
        }

    @property
    def needs_data(self) -> bool:
        """Whether a scale is calibrated; without one no forward pass is needed."""
        return bool(self._modifier().requires_calibration_data)

    def recipe_yaml(self) -> str:
        return str(CompressorRecipe.from_modifiers([self._modifier()]).yaml())

    def quantization_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """``quantization_config`` of config.json, with vLLM's module names."""
        schemes = [scheme_of(group, group.serve) for group in self.recipe.group]
        config = QuantizationConfig(
            config_groups=_numbered(schemes),
            ignore=list(ignore),
            format=MIXED,
            quantization_status="compressed",
        )
        return {
            "quant_method": "compressed-tensors",
            "version": compressed_tensors.__version__,
            **config.model_dump(mode="json", exclude={"quant_method"}),
            "scale_fmt": self.recipe.scale_fmt,
        }

    def embed(self, weight: StoredTensor, states: Hidden) -> None:
        """Write the first layer's input: each token's embedding, once per stream."""
        table = load_tensor(weight).bfloat16()
        with states.write() as sink:
            for row in states.tokens:
                embedded = table[torch.tensor([list(row)])]
                streams = embedded.unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1)
                sink(tensor_bytes(streams))

    def layer(
        self, index: int, weights: Mapping[str, StoredTensor], source: Hidden, target: Hidden
    ) -> list[TensorToWrite]:
        """Quantize a layer: input states at ``source``, its output states to ``target``.

        ``weights`` are all its tensors by upstream name. ``target`` appears when all states are in.

        Returns the tensors of each quantized module, in upstream naming; QuantizedOutputError if a
        scale that the recipe names was not calibrated.
        """
        model = OneLayer(self.config, index, self.rotary)
        names = self._fill(model, weights)
        with target.write() as sink:
            model.sink = sink
            self._calibrate(model.to(self.device), _batches(source, self.config))
        return list(self._compressed(model, names))

    def _modifier(self) -> QuantizationModifier:
        schemes = [scheme_of(group, group.calibrate) for group in self.recipe.group]
        return QuantizationModifier(config_groups=_numbered(schemes), ignore=[])

    def _fill(self, model: OneLayer, weights: Mapping[str, StoredTensor]) -> dict[str, str]:
        """Load the weights; return upstream module name by transformers' module name."""
        state, names = {}, {}
        dtypes = {t.name: DTYPES[t.dtype] for t in layer_tensors(self.source, model.index)}
        for name, stored in weights.items():
            renamed = f"model.{rename_source_key(name, self.renamings, [])[0]}"
            state[renamed] = load_tensor(stored).to(dtypes[name])  # FP32 is taken for BF16
            names[renamed.removesuffix(".weight")] = name.removesuffix(".weight")
        model.load_state_dict(state, strict=True, assign=True)
        return names

    def _calibrate(self, model: OneLayer, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        warnings: list[str] = []
        handle = logger.add(lambda message: warnings.append(str(message)), level="WARNING")
        with create_session() as session, moe_calibration_context():
            with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
                recipe = CompressorRecipe.from_modifiers([self._modifier()])
                session.initialize(model=model, recipe=recipe, start=-1)
            BasicPipeline()(model, batches, None)
            session.finalize()
        logger.remove(handle)
        if unobserved := [text for text in warnings if UNOBSERVED in text]:
            what = f"{len(unobserved)} scales were not calibrated: {unobserved[0]}"
            raise QuantizedOutputError(what, where=f"layer {model.index}")

    def _compressed(self, model: OneLayer, names: Mapping[str, str]) -> Iterator[TensorToWrite]:
        for name, module in model.named_modules():
            if not is_module_quantized(module):
                continue
            compress_module(module)
            for leaf, value in module.state_dict().items():
                yield _item(f"{names[name]}.{leaf}", value)


def scheme_of(group: Group, targets: Sequence[str]) -> QuantizationScheme:
    """A group's scheme, for the modules that ``targets`` match."""
    scheme = preset_name_to_scheme(group.scheme, list(targets))
    # Said, because inferring it takes only torch's own Linear (compressed-tensors 0.19.0,
    # compressors/base.py: COMPRESSIBLE_MODULE_TYPES), and wo_a is a subclass of it.
    return scheme.model_copy(update={"format": group.format})


def _numbered(schemes: Iterable[QuantizationScheme]) -> dict[str, QuantizationScheme]:
    return {f"group_{number}": scheme for number, scheme in enumerate(schemes)}


def _item(name: str, value: torch.Tensor) -> TensorToWrite:
    """The tensor in the form that vLLM takes: scalar global scales, FP32 block scales."""
    if name.endswith("_global_scale"):
        value = value.squeeze()  # compressed-tensors writes (1,)
    if name.endswith(".weight_scale") and re.search(r"\.attn\.\w+\.weight_scale$", name):
        value = value.float()  # exact
    return TensorToWrite(
        name=name,
        dtype=NAMES[value.dtype],
        shape=tuple(value.shape),
        chunks=lambda: (tensor_bytes(value),),
    )
