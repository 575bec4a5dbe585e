"""Checks that need nothing but names: files and tensors that are missing, or that should not be."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vllm_forge.checkpoints.inspect.findings import (
    Effect,
    Finding,
    Scope,
    by_scope,
    finding,
    scoped,
    summarize,
)
from vllm_forge.checkpoints.inspect.formats import (
    DRAFT,
    LINEAR,
    Drafter,
    Part,
    alias_tensors,
    part_of,
    split,
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
# A matrix is stored if one of these suffixes is.
WEIGHTS = ("weight", "weight_packed")


def files(profile: Profile) -> Iterator[Finding]:
    """Shards, index and sizes agree."""
    checkpoint = profile.checkpoint
    if missing := checkpoint.missing_shards:
        yield finding(
            "missing-shards",
            f"{len(missing)} of {len(set((checkpoint.index or {}).values()))} shards are not "
            f"here, e.g. {missing[0]}",
            effect=Effect.REFUSES if checkpoint.tensors else Effect.NOTES,
        )
    if checkpoint.misplaced:
        yield finding(
            "index-differs",
            f"not where the index says, or not in it: {summarize(checkpoint.misplaced)}; vLLM "
            "takes from the index which shards there are, and no more, other readers stop",
        )
    if not missing and checkpoint.tensors and checkpoint.total_size not in (None, checkpoint.bytes):
        yield finding(
            "total-size",
            f"it says {checkpoint.total_size} bytes, the tensors have {checkpoint.bytes}",
        )


def drafter(profile: Profile) -> Iterator[Finding]:
    """The drafter is the one that the config promises, and complete."""
    promised, count = len(profile.draft_layers), len(profile.draft_names)
    if not promised and profile.drafter is not Drafter.NONE:
        yield finding(
            "unpromised-drafter",
            f"{count} tensors are under mtp., and num_nextn_predict_layers is 0 or not there",
        )
        return
    match profile.drafter:
        case Drafter.NONE if promised:
            yield finding(
                "no-mtp",
                f"config.json promises {promised} draft layer(s), and no tensor is under mtp.",
            )
        case Drafter.DSPARK:
            yield finding(
                "dspark",
                f"mtp. holds {count} tensors of a DSpark drafter (it has a markov_head, and "
                "neither enorm nor hnorm); method=mtp would load part of them",
            )
        case Drafter.UNKNOWN:
            yield finding(
                "unknown-drafter", f"neither MTP nor DSpark: {summarize(profile.draft_names)}"
            )
    if profile.drafter not in (Drafter.MTP, Drafter.DSPARK):
        return
    if absent := list(_absent(profile, profile.draft.values())):
        is_mtp = profile.drafter is Drafter.MTP
        yield finding(
            "incomplete-drafter",
            f"missing {summarize(absent)}, of {len(profile.draft)} that its config has",
            check="missing-mtp" if is_mtp else "other-drafter",
        )
    aliases = [tensor.name for tensor in alias_tensors(profile.config)]
    if profile.drafter is Drafter.MTP and not profile.names.keys() >= set(aliases):
        yield finding(
            "no-aliases",
            "the draft model takes the target's own after loading; with pipeline parallelism it "
            "does not get the embedding",
        )


def experts(profile: Profile) -> Iterator[Finding]:
    """Every projection of every expert of every layer."""
    wanted = [t for t in profile.main.values() if part_of(t.name) is Part.EXPERTS]
    if absent := list(_absent(profile, wanted)):
        yield finding(
            "missing-experts",
            f"{len(wanted) - len(absent)} of {len(wanted)} (layers x experts x 3) weights are "
            f"there; missing {summarize(absent)}",
        )


def router(profile: Profile) -> Iterator[Finding]:
    """The bias of the routers, under the name that the loader renames."""
    wanted = {**profile.main, **(profile.draft if profile.drafter is not Drafter.NONE else {})}
    tables = [n for n in wanted if n.endswith(ROUTERS) and n not in profile.names]
    if renamed := [n for n in tables if _other_name(n) in profile.names]:
        yield finding(
            "renamed-router-bias",
            f"{summarize(map(_other_name, renamed))}; loaders rename DeepSeek's gate.bias to it, "
            "so it fits, too",
        )
    yield from scoped("missing-router-bias", sorted(set(tables) - set(renamed)), _missing)


def shared_experts(profile: Profile) -> Iterator[Finding]:
    """No matrix that was saved row by row."""
    if rows := [name for name in profile.names if ROWS.search(name)]:
        yield finding("split-rows", summarize(rows))


def others(profile: Profile) -> Iterator[Finding]:
    """Everything else that the config implies is stored."""
    wanted = [
        tensor
        for tensor in profile.main.values()
        if part_of(tensor.name) is not Part.EXPERTS and not tensor.name.endswith(ROUTERS)
    ]
    if absent := list(_absent(profile, wanted)):
        yield finding("missing-tensors", _missing(absent))


def unknown(profile: Profile) -> Iterator[Finding]:
    """No names that no module of the model has; loaders look each of them up."""
    promised = bool(profile.draft_layers)
    expected = [*profile.main.values(), *alias_tensors(profile.config)]
    expected += profile.draft.values() if profile.drafter is not Drafter.NONE else []
    known = {split(tensor.name)[0] for tensor in expected}
    known |= {_other_name(tensor.name) for tensor in expected}
    names = [
        name
        for name in profile.names
        if split(name)[0] not in known and not ROWS.search(name) and not name.endswith(SKIPPED)
    ]
    if profile.drafter is Drafter.UNKNOWN or not promised:  # `drafter` reports these
        names = [name for name in names if not name.startswith(DRAFT)]
    numbers = tuple(f"layers.{number}." for number in profile.draft_layers)
    for scope, own in by_scope(names):
        misnamed = scope is Scope.DRAFT or bool(numbers and own[0].startswith(numbers))
        hint = "loaders look for the draft layer under mtp.0, without a model. in front"
        remedy = {"remedy": hint} if misnamed and not profile.draft_names else {}
        yield finding("unknown-tensors", summarize(own), scope=scope, **remedy)


def tokenizer(profile: Profile) -> Iterator[Finding]:
    """What serving needs beside the tensors."""
    if profile.tensors and TOKENIZER not in profile.checkpoint.source.sizes:
        yield finding("no-tokenizer", f"no {TOKENIZER}: it serves with --tokenizer alone")


def _missing(names: list[str]) -> str:
    return f"missing {summarize(names)}"


def _absent(profile: Profile, wanted: Iterable[TensorSpec]) -> Iterator[str]:
    """Tensors, or weights in whatever format, that are not stored."""
    for tensor in wanted:
        if LINEAR.search(tensor.name):
            module, _ = split(tensor.name)
            if not any(f"{module}.{suffix}" in profile.names for suffix in WEIGHTS):
                yield tensor.name
        elif not {tensor.name, _other_name(tensor.name)} & profile.names.keys():
            yield tensor.name


def _other_name(name: str) -> str:
    return name.replace(".gate.bias", ".gate.e_score_correction_bias")


CHECKS = (files, drafter, experts, router, shared_experts, others, unknown, tokenizer)
