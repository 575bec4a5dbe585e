"""One decoder layer of transformers' DeepSeek-V4, alone: its weights, its inputs, its output.

Needs the environment of docker/locks/quantize.txt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from transformers import DeepseekV4Config
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_forge.checkpoints.quantize.hidden_states import Hidden
    from vllm_forge.checkpoints.tensors import StoredTensor

DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}


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
        self.sink: Callable[[bytes], None]

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


class Batches:
    """The samples, one at a time from the disk; in place of a data loader."""

    def __init__(self, hidden: Hidden, config: DeepseekV4Config) -> None:
        self.hidden, self.config = hidden, config

    def __len__(self) -> int:
        return len(self.hidden.tokens)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number, row in enumerate(self.hidden.tokens):
            states = torch.frombuffer(self.hidden.read(number), dtype=torch.bfloat16)
            shape = (1, len(row), self.config.hc_mult, self.config.hidden_size)
            yield {"hidden_states": states.view(shape), "input_ids": torch.tensor([list(row)])}


def load_tensor(stored: StoredTensor) -> torch.Tensor:
    """A stored tensor, in memory of its own."""
    return torch.frombuffer(stored.read(), dtype=DTYPES[stored.dtype]).view(stored.shape)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, row-major."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy().tobytes())
