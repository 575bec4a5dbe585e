"""The draft block needs neither its own embedding nor its own head in the checkpoint.

vllm-project/vllm#43456 reports an acceptance of exactly 0 % when the checkpoint keeps `embed` and
`head` only at its top level, and #43459 would route them to the draft block; the model card copies
both under `mtp.0` instead. On these lines the proposer gives every draft model without a say in it
the target's own modules after loading (v1/spec_decode/llm_base_proposer.py:1325 and :1393 in
0.22.1; the second model runner of 0.26.0 and 0.33.0 has the same in
v1/worker/gpu/spec_decode/eagle/utils.py), so neither is needed. With pipeline parallelism the
embedding is not shared.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn


def _linear(fill: float) -> nn.Module:
    module = nn.Linear(4, 8, bias=False)
    nn.init.constant_(module.weight, fill)
    return module


def _target() -> Any:
    target: Any = nn.Module()
    target.model = nn.Module()
    target.model.embed_tokens = _linear(1.0)
    target.lm_head = _linear(2.0)
    return target


def _draft() -> Any:
    """A DeepSeek V4 draft as built, its embedding and head not loaded from anywhere."""
    layer: Any = nn.Module()
    layer.shared_head = nn.Module()
    layer.shared_head.head = _linear(float("nan"))
    draft: Any = nn.Module()
    draft.model = nn.Module()
    draft.model.embed_tokens = _linear(float("nan"))
    draft.model.layers = nn.ModuleDict({"43": layer})
    return draft


def test_an_mtp_draft_gets_the_targets_embedding_and_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.models.deepseek_v4.nvidia.mtp import DeepSeekV4MTP
    from vllm.v1.spec_decode import llm_base_proposer

    for say in ("has_own_embed_tokens", "has_own_lm_head"):
        assert not hasattr(DeepSeekV4MTP, say)
    monkeypatch.setattr(llm_base_proposer, "get_pp_group", lambda: SimpleNamespace(world_size=1))
    target, draft = _target(), _draft()
    proposer: Any = object.__new__(llm_base_proposer.SpecDecodeBaseProposer)
    proposer.model = draft
    # What the same function asks for on behalf of other models and features.
    proposer.use_local_argmax_reduction = False
    draft_model_config = SimpleNamespace(hf_config=SimpleNamespace())
    proposer.vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(draft_model_config=draft_model_config)
    )
    proposer._maybe_share_embeddings(target)
    proposer._maybe_share_lm_head(target)
    assert draft.model.embed_tokens is target.model.embed_tokens
    assert draft.model.layers["43"].shared_head.head is target.lm_head
    assert not any(torch.isnan(p).any() for p in draft.parameters())
