"""Which part of the model a tensor belongs to, and which tensors its config promises.

Names and dtypes of the model itself are in checkpoints.inventory; here are the drafters that may
lie under ``mtp.``, and the classes in which dtypes and formats are reported.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.inventory import all_tensors, dspark_tensors, has_dspark, mtp_tensors
from vllm_forge.checkpoints.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

DRAFT = "mtp."


class Part(StrEnum):
    """The classes of DeepSeek V4's tensors. Order of rows in tables."""

    EXPERTS = "experts"
    ATTENTION = "attention"
    COMPRESSOR = "compressor"
    INDEXER = "indexer"
    SHARED_EXPERTS = "shared experts"
    ROUTER = "router"
    NORMS = "norms"
    HYPER = "hyper-connections"
    SINKS = "attention sinks"
    EMBEDDING = "embedding and head"
    PROJECTIONS = "draft projections"
    DRAFT_HEADS = "draft heads"
    OTHER = "other"


# First match wins; the names are without "layers.<i>." or "mtp.<i>.".
RULES = tuple(
    (re.compile(pattern), part)
    for pattern, part in (
        (r"ffn\.experts\.\d+\.", Part.EXPERTS),
        (r"ffn\.shared_experts\.", Part.SHARED_EXPERTS),
        (r"ffn\.gate\.", Part.ROUTER),
        (r"attn\.indexer\.", Part.INDEXER),
        (r"attn\.compressor\.", Part.COMPRESSOR),
        (r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|fused_wqa_wkv)\.", Part.ATTENTION),
        (r"attn\.attn_sink$", Part.SINKS),
        (r"hc_(attn|ffn|head)_", Part.HYPER),
        (r"(attn\.)?(\w*_)?norm\.weight$|[eh]norm\.weight$", Part.NORMS),
        (r"(embed|head|emb\.tok_emb|lm_head|embed_tokens)\.weight$", Part.EMBEDDING),
        (r"(e_proj|h_proj|main_proj)\.", Part.PROJECTIONS),
        (r"(markov_head|confidence_head)\.", Part.DRAFT_HEADS),
    )
)
BLOCK = re.compile(r"^(?:layers|mtp)\.\d+\.")
# Matrices that a quantizer may take; every other tensor is stored as it is.
LINEAR = re.compile(
    r"\.(w1|w2|w3|wq_a|wq_b|wkv|wo_a|wo_b|wgate|weights_proj|e_proj|h_proj|main_proj)\.weight$"
)


class Drafter(StrEnum):
    """What the tensors under ``mtp.`` are."""

    NONE = "none"
    MTP = "mtp"
    DSPARK = "dspark"
    UNKNOWN = "unknown"


def part_of(name: str) -> Part:
    """The class of a stored tensor, by its name."""
    local = BLOCK.sub("", name)
    return next((part for pattern, part in RULES if pattern.match(local)), Part.OTHER)


def drafter_of(names: Iterable[str]) -> Drafter:
    """By the tensors that only one of them has: MTP's enorm and hnorm, DSpark's Markov head."""
    drafts = [name for name in names if name.startswith(DRAFT)]
    if not drafts:
        return Drafter.NONE
    locals_ = {BLOCK.sub("", name).partition(".")[0] for name in drafts}
    if "markov_head" in locals_:
        return Drafter.DSPARK
    if locals_ & {"enorm", "hnorm", "e_proj", "h_proj"}:
        return Drafter.MTP
    return Drafter.UNKNOWN


def main_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """Everything but the drafter."""
    return (tensor for tensor in all_tensors(config) if not tensor.name.startswith(DRAFT))


def draft_tensors(config: Mapping[str, Any], drafter: Drafter) -> Iterator[TensorSpec]:
    """What must lie under ``mtp.``."""
    if drafter is Drafter.MTP:
        yield from mtp_tensors(config)
    elif drafter is Drafter.DSPARK and has_dspark(config):
        yield from dspark_tensors(config)


def alias_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """Copies of embedding and head below ``mtp.0``, which some artifacts have.

    vLLM gives the draft model the target's own modules after loading
    (tests/patches/test_draft_shares_embeddings.py), so they are optional.
    """
    shape = (config["vocab_size"], config["hidden_size"])
    for name in ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"):
        yield TensorSpec(name=name, dtype="BF16", shape=shape)
