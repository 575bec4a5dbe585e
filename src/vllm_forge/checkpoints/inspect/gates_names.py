"""Gates that need nothing but names: what is there, what is not, and what should not be."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vllm_forge.checkpoints.inspect.findings import Effect, Finding, Scope, by_scope, some
from vllm_forge.checkpoints.inspect.formats import split
from vllm_forge.checkpoints.inspect.parts import (
    DRAFT,
    LINEAR,
    Drafter,
    Part,
    alias_tensors,
    part_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vllm_forge.checkpoints.inspect.profile import Profile
    from vllm_forge.checkpoints.tensors import TensorSpec

ROWS = re.compile(r"ffn\.shared_experts\.(down_proj|w2)\.\d+(\.|$)")
ROUTERS = (".gate.bias", ".gate.tid2eid")
# Buffers that older writers saved, and that vLLM skips (model_executor/models/utils.py,
# ROTARY_EMBEDS_UNUSED_WEIGHTS).
SKIPPED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
TOKENIZER = "tokenizer.json"
# Suffixes of which one must be there for a matrix to be there.
WEIGHTS = ("weight", "weight_packed")


def files(profile: Profile) -> Iterator[Finding]:
    """Shards, index and sizes agree."""
    checkpoint = profile.checkpoint
    if missing := checkpoint.missing_shards:
        yield Finding(
            gate="files",
            title="shards are missing",
            effect=Effect.REFUSES if checkpoint.tensors else Effect.NOTES,
            what=f"{len(missing)} of {len(set((checkpoint.index or {}).values()))} shards "
            f"are not here, e.g. {missing[0]}",
            remedy="fetch them; with the index alone, only names can be judged",
        )
    if checkpoint.misplaced:
        yield Finding(
            gate="files",
            title="index and shards disagree",
            effect=Effect.DEPARTS,
            what=f"not where the index says, or not in it: {some(checkpoint.misplaced)}; vLLM "
            "takes from the index which shards there are, and no more, other readers stop",
            remedy="write a new index of the shards",
        )
    if not missing and checkpoint.tensors and checkpoint.total_size not in (None, checkpoint.bytes):
        yield Finding(
            gate="files",
            title="the index's total_size is wrong",
            effect=Effect.NOTES,
            what=f"it says {checkpoint.total_size} bytes, the tensors have {checkpoint.bytes}",
        )


def drafter(profile: Profile) -> Iterator[Finding]:
    """G01, G15, G69: the drafter that the config promises."""
    promised = len(profile.draft_layers)
    if not promised and profile.drafter is not Drafter.NONE:
        yield Finding(
            gate="config",
            title="a drafter that config.json does not promise",
            effect=Effect.REFUSES,
            scope=Scope.DRAFT,
            what=f"{len(profile.draft_names)} tensors are under mtp., and num_nextn_predict_layers "
            "is 0 or not there",
            remedy="take num_nextn_predict_layers from the source model's config.json",
        )
        return
    match profile.drafter:
        case Drafter.NONE if promised:
            yield Finding(
                gate="G01",
                title="no MTP block",
                effect=Effect.REFUSES,
                scope=Scope.DRAFT,
                what=f"config.json promises {promised} draft layer(s), and no tensor is under mtp.",
                remedy="transformers drops mtp.* when it loads a model "
                "(_keys_to_ignore_on_load_unexpected): pass these tensors through as bytes",
            )
        case Drafter.DSPARK:
            yield Finding(
                gate="G69",
                title="a DSpark drafter, not MTP",
                effect=Effect.REFUSES,
                scope=Scope.DRAFT,
                what=f"mtp. holds {len(profile.draft_names)} tensors of a DSpark drafter (it has "
                "a markov_head, and neither enorm nor hnorm); method=mtp would load part of them",
                remedy='serve it with {"method": "dspark"} on a line that has it',
            )
        case Drafter.UNKNOWN:
            yield Finding(
                gate="G69",
                title="an unknown drafter",
                effect=Effect.REFUSES,
                scope=Scope.DRAFT,
                what=f"neither MTP nor DSpark: {some(profile.draft_names)}",
            )
        case _:
            pass
    if profile.drafter in (Drafter.MTP, Drafter.DSPARK):
        if absent := list(_absent(profile, profile.draft.values())):
            yield Finding(
                gate="G01" if profile.drafter is Drafter.MTP else "G69",
                title="the drafter is not complete",
                effect=Effect.REFUSES,
                scope=Scope.DRAFT,
                what=f"missing {some(absent)}, of {len(profile.draft)} that its config has",
                remedy="vLLM checks no more than that one tensor of the layer is there, and "
                "drafts with what memory held: take all of mtp.* from the source",
            )
        wanted = [tensor.name for tensor in alias_tensors(profile.config)]
        if profile.drafter is Drafter.MTP and any(name not in profile.names for name in wanted):
            yield Finding(
                gate="G15",
                title="embedding and head are not repeated below mtp.0",
                effect=Effect.NOTES,
                scope=Scope.DRAFT,
                what="the draft model takes the target's own after loading; with pipeline "
                "parallelism it does not get the embedding",
                remedy=f"add {' and '.join(wanted)} for pipeline parallelism",
            )


def experts(profile: Profile) -> Iterator[Finding]:
    """G05: every projection of every expert of every layer."""
    wanted = [t for t in profile.main.values() if part_of(t.name) is Part.EXPERTS]
    if absent := list(_absent(profile, wanted)):
        yield Finding(
            gate="G05",
            title="experts are missing",
            effect=Effect.REFUSES,
            what=f"{len(wanted) - len(absent)} of {len(wanted)} (layers x experts x 3) weights "
            f"are there; missing {some(absent)}",
            remedy="save from every rank, and merge before the index is written",
        )


def router(profile: Profile) -> Iterator[Finding]:
    """G22: the bias of the routers, under the name that the loader renames."""
    wanted = {**profile.main, **(profile.draft if profile.drafter is not Drafter.NONE else {})}
    tables = [n for n in wanted if n.endswith(ROUTERS) and n not in profile.names]
    if renamed := [n for n in tables if _other_name(n) in profile.names]:
        yield Finding(
            gate="G22",
            title="router biases have transformers' name",
            effect=Effect.DEPARTS,
            what=f"{some(map(_other_name, renamed))}; loaders rename DeepSeek's gate.bias to it, "
            "so it fits, too",
            remedy="name them layers.N.ffn.gate.bias, as DeepSeek does",
        )
    for scope, absent in by_scope(sorted(set(tables) - set(renamed))):
        yield Finding(
            gate="G22",
            title="router biases or tables are missing",
            effect=Effect.REFUSES,
            scope=scope,
            what=f"missing {some(absent)}",
            remedy="take them from the source model",
        )


def shared_experts(profile: Profile) -> Iterator[Finding]:
    """G17: a matrix that was saved row by row."""
    if rows := [name for name in profile.names if ROWS.search(name)]:
        yield Finding(
            gate="G17",
            title="shared_experts.down_proj is split into rows",
            effect=Effect.REFUSES,
            what=some(rows),
            remedy="stack the rows again: one matrix per layer, named w2",
        )


def rest(profile: Profile) -> Iterator[Finding]:
    """Everything else that the config has and the checkpoint does not."""
    told = {Part.EXPERTS}
    wanted = [
        t
        for t in profile.main.values()
        if part_of(t.name) not in told and not t.name.endswith(ROUTERS)
    ]
    if absent := list(_absent(profile, wanted)):
        yield Finding(
            gate="names",
            title="tensors are missing",
            effect=Effect.REFUSES,
            what=f"missing {some(absent)}",
            remedy="take them from the source model",
        )


def foreign(profile: Profile) -> Iterator[Finding]:
    """Names that no module of the model has; loaders look each of them up."""
    promised = bool(profile.draft_layers)
    expected = [*profile.main.values(), *alias_tensors(profile.config)]
    expected += profile.draft.values() if profile.drafter is not Drafter.NONE else []
    known = {split(tensor.name)[0] for tensor in expected}
    known |= {_other_name(tensor.name) for tensor in expected}
    unknown = [n for n in profile.names if split(n)[0] not in known and not ROWS.search(n)]
    unknown = [n for n in unknown if not n.endswith(SKIPPED)]
    if profile.drafter is Drafter.UNKNOWN or not promised:  # told by `drafter`
        unknown = [n for n in unknown if not n.startswith(DRAFT)]
    numbers = tuple(f"layers.{number}." for number in profile.draft_layers)
    for scope, names in by_scope(unknown):
        drafts = scope is Scope.DRAFT or bool(numbers and names[0].startswith(numbers))
        yield Finding(
            gate="names",
            title="tensors that the model does not have",
            effect=Effect.REFUSES,
            scope=scope,
            what=some(names),
            remedy="loaders look for the draft layer under mtp.0, without a model. in front"
            if drafts and not profile.draft_names
            else "take config.json and tensors from the same model, or drop these",
        )


def tokenizer(profile: Profile) -> Iterator[Finding]:
    """What serving needs beside the tensors."""
    if profile.tensors and TOKENIZER not in profile.checkpoint.source.sizes:
        yield Finding(
            gate="files",
            title="there is no tokenizer",
            effect=Effect.NOTES,
            what=f"no {TOKENIZER}: it serves with --tokenizer alone",
            remedy="copy the tokenizer's files from the source model",
        )


def _absent(profile: Profile, wanted: Iterable[TensorSpec]) -> Iterator[str]:
    """Tensors, or weights in whatever format, that are not there."""
    for tensor in wanted:
        if LINEAR.search(tensor.name):
            module, _ = split(tensor.name)
            if not any(f"{module}.{suffix}" in profile.names for suffix in WEIGHTS):
                yield tensor.name
        elif not {tensor.name, _other_name(tensor.name)} & profile.names.keys():
            yield tensor.name


def _other_name(name: str) -> str:
    return name.replace(".gate.bias", ".gate.e_score_correction_bias")


GATES = (files, drafter, experts, router, shared_experts, rest, foreign, tokenizer)
