"""Which modules a quantization_config means: compressed-tensors' rules, on vLLM's module names.

Used where vLLM itself is not at hand, and by the checks of rules that match nothing or too much. A
rule "re:..." is matched at the start of the name (compressed_tensors/utils/match.py `match_name`:
re.match); any other one is the whole name, or the class of the module. vLLM asks with names of its
own modules, with two projections fused (vllm/model_executor/layers/quantization/
compressed_tensors/utils.py `find_matched_target`).

An untrusted regular expression may take longer than anyone waits ("re:(a+)+$"), and neither ``re``
nor vLLM, which matches the same ones, has a limit. So they are tried first, under a limit of CPU
time, which a busy machine does not exhaust; ``re`` looks for signals while it matches.
"""

import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

from packaging.version import Version

from vllm_forge.checkpoints.architecture import FUSED, PATTERN, SPARSE, Group, Rules, compiled
from vllm_forge.checkpoints.errors import CheckpointUnreadableError

# get_moe_method probes three names of expert 0 below the experts' own name.
OLD_PROBES, NEW_PROBES = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
PROBES_CHANGED = Version("0.32.0")
ATTENTION_MODULES = ("fused_wqa_wkv", "wq_b", "wo_a", "wo_b")
INDEXER_MODULES = ("wq_b", "weights_proj", "compressor.fused_wkv_wgate")
# A hundred times what the rules of a real artifact take on all of its names.
LIMIT_S = 10.0
MOST_PATTERNS = 1000  # each is tried on each name; real artifacts have ten
MAX_LENGTH = 1 << 16  # of a pattern: its compiled form takes memory


def resolve(
    groups: Mapping[str, Group], ignore: Rules, name: str, version: Version
) -> Group | None:
    """The group that a module gets; None: it is not quantized.

    One that means its name comes before all that mean its class; an ignore list means no class.
    """
    if ignore.means(name, version):
        return None
    named = (group for group in groups.values() if group.rules.means(name, version))
    classes = (group for group in groups.values() if "Linear" in group.rules.literal)
    return next(chain(named, classes), None)


def probes(version: Version) -> tuple[str, str, str]:
    """Names that vLLM asks with for gate, up and down projection of the routed experts."""
    return OLD_PROBES if version < PROBES_CHANGED else NEW_PROBES


def resolve_experts(
    groups: Mapping[str, Group], ignore: Rules, layer: int, version: Version
) -> list[Group | None]:
    """The group of each of the three projections; vLLM refuses them if they differ."""
    names = (f"model.layers.{layer}.ffn.experts.0.{probe}" for probe in probes(version))
    return [resolve(groups, ignore, name, version) for name in names]


def serving_modules(config: Mapping[str, Any], layers: Iterable[int]) -> list[str]:
    """VLLM's names of the linear modules of some layers, experts under both of their names."""
    modules = []
    for layer in layers:
        draft = layer >= config["num_hidden_layers"]
        ratio = 0 if draft else config["compress_ratios"][layer]
        names = [f"attn.{module}" for module in ATTENTION_MODULES]
        names += ["ffn.gate", "ffn.shared_experts.gate_up_proj", "ffn.shared_experts.down_proj"]
        names += ["attn.compressor.fused_wkv_wgate"] if ratio > 1 else []
        names += [f"attn.indexer.{module}" for module in INDEXER_MODULES] if ratio == SPARSE else []
        names += ["e_proj", "h_proj"] if draft else []
        names += [f"ffn.experts.0.{probe}" for probe in (*OLD_PROBES, *NEW_PROBES)]
        modules += [f"model.layers.{layer}.{name}" for name in names]
    return modules


def asked_names(config: Mapping[str, Any], layers: Iterable[int]) -> list[str]:
    """All names that a rule is asked with: those, and the parts of what is fused in them."""
    names = serving_modules(config, layers)
    for prefix, _, last in [name.rpartition(".") for name in names]:
        names += [f"{prefix}.{part}" for part in FUSED.get(last, ())]
    return names


def is_pattern(rule: str) -> bool:
    """Whether it is a regular expression, or one of ModelOpt's wildcards."""
    return rule.startswith(PATTERN) or any(mark in rule for mark in "*?[")


class _Expired(BaseException):
    """The CPU time is spent; not an Exception, so that nothing on the way handles it."""


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    def expire(*_: object) -> None:
        raise _Expired

    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def require_termination(
    targets: Iterable[str],
    ignore: Iterable[str],
    names: Iterable[str],
    rest: Iterable[str],
    where: str,
) -> None:
    """Refuse a config with a pattern that does not terminate. Call it from the main thread.

    All rules are matched with ``names``; ``targets`` that match none of them, with ``rest``.
    CheckpointUnreadableError: a pattern is longer than MAX_LENGTH, or all of them together take
    more than LIMIT_S of CPU time.
    """
    rules = dict.fromkeys(ignore, False) | dict.fromkeys(targets, True)
    names, rest, rule = list(names), list(rest), ""
    try:
        with _cpu_limit(LIMIT_S):
            for rule, is_target in rules.items():
                if not is_pattern(rule):
                    continue
                if len(rule) > MAX_LENGTH:
                    raise _refused(f"longer than {MAX_LENGTH} characters", rule, where)
                if (pattern := compiled(rule)) is None:
                    continue  # checks_config.rules reports it
                matched = [name for name in names if pattern.match(name)]
                if is_target and not matched:
                    for name in rest:
                        pattern.match(name)
    except _Expired:
        what = f"that takes more than {LIMIT_S:g} s on the model's names"
        raise _refused(what, rule, where) from None


def _refused(fault: str, rule: str, where: str) -> CheckpointUnreadableError:
    what = f"quantization_config has a pattern {fault}: {rule[:500]}"
    remedy = "write it without a repetition of repetitions"
    return CheckpointUnreadableError(what, where=where, remedy=remedy)
