"""GPU memory of a deployment as vLLM shares it out: weights of a rank, KV cache, what is left.

Weights are those of the artifact's manifest; the KV cache is what vLLM asks for one request of
``--max-model-len`` tokens, without which it does not start. Both are known. Activations, NCCL and
CUDA graphs are not: they depend on kernels, and are measured by vLLM itself. Bytes throughout.
"""

import bisect
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, reduce
from operator import or_

from packaging.version import Version

from vllm_forge.checkpoints.tensors import DTYPE_BYTES
from vllm_forge.host.files import GIB
from vllm_forge.kernels.selection.questions import Answer, KvCache, artifact_config
from vllm_forge.matrix import flags
from vllm_forge.matrix.flags import Parallel
from vllm_forge.serve.machine import Level

# What tensor parallelism splits; each rank holds the rest. fused_wqa_wkv and the compressor have
# disable_tp, the indexer and the draft's projections are ReplicatedLinear (vLLM 0.26.0,
# models/deepseek_v4/attention.py:203-235, 700-712; compressor.py:260; nvidia/mtp.py:89-103;
# nvidia/model.py:109, 998, 1407; 0.22.1 and 0.33.0 alike).
SPLIT = re.compile(
    r"(layers|mtp)\.\d+\.(attn\.(wq_b|wo_a|wo_b|attn_sink)|ffn\.shared_experts)(\..*)?"
    r"|(embed|head)\.weight"
)
PER_EXPERT = re.compile(r"\.ffn\.(experts\.|gate\.(weight|bias)$)")
EXPERTS, COPIES = "experts", "copies"
LAYERS, DRAFT, EMBEDDING = "layers", "mtp", "embed"
# A window's blocks are freed after the steps in flight from here on (0.26.0, config/vllm.py:525;
# 0.22.1, v1/kv_cache_interface.py:464 counts one step), and a block is stored without the padding
# that is counted before the start (0.26.0, v1/core/kv_cache_utils.py:1303).
IN_FLIGHT = PACKED = Version("0.26")
# A block is as large as the widest group of layers (0.33.0, v1/core/kv_cache_planning.py:574;
# before, v1/core/kv_cache_utils.py:1857, every group has the layers of the fullest one).
WIDEST = Version("0.33")
# Seen beside weights and KV cache, by subtraction: a start with 5.3 GiB or less (RTX PRO 6000, TP2,
# --max-num-batched-tokens=2048: the model card's), failures with 8.3 (2048 tokens,
# yhfgyyf/vllm-deepseek-v4-sm89#54) and 11.5 (16384 tokens, vllm-project/vllm#44376). An H200 in a
# rehearsal at TP2 took 5.4 (8192 tokens): activations 3.4, graphs 1.3, 0.3 not of torch.
OVERHEAD = 12 * GIB
MOST_UTILIZATION = 0.97  # the driver and NCCL need the rest

Sizes = Mapping[tuple[str, str], int]


@cache
def stored_sizes(artifact: str) -> Sizes | None:
    """Bytes of an artifact's tensors, by the part of the model and by what splits them over GPUs.

    None without a manifest of that name. The model of one expert is asked, for all are alike.
    """
    from vllm_forge.checkpoints.inspect.manifest import manifests  # noqa: PLC0415 - takes 0.1 s
    from vllm_forge.checkpoints.inspect.profile import alias_tensors  # noqa: PLC0415

    if (manifest := manifests().get(artifact)) is None:
        return None
    config = artifact_config(artifact)
    copies = {tensor.name for tensor in alias_tensors(config)}
    sizes = Counter[tuple[str, str]]()
    for tensor in manifest.wanted({**config, "n_routed_experts": 1}):
        kind = COPIES if tensor.name in copies else "whole"
        size = math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtypes[0]]
        if PER_EXPERT.search(tensor.name):
            size *= int(config["n_routed_experts"])
        if ".ffn.experts." in tensor.name:
            kind = EXPERTS
        elif SPLIT.fullmatch(tensor.name):
            kind = "split"
        sizes[tensor.name.partition(".")[0], kind] += size
    return sizes


def weights_per_rank(artifact: str, spread: Parallel, *, drafting: bool) -> int | None:
    """Bytes of weights on the fullest GPU; None without a manifest.

    Experts are divided over all ranks of TP and DP, with expert parallelism (whole experts) or
    without (fused_moe/config.py, flatten_tp_across_dp_and_pcp). Embedding and head are once in the
    first and last pipeline stage, and the draft layer in the last. Copies of them are not kept.
    """
    sizes = stored_sizes(artifact)
    if sizes is None:
        return None
    ranks = {"split": spread.tensor, EXPERTS: spread.tensor * spread.data * spread.context}
    layers = int(artifact_config(artifact)["num_hidden_layers"])
    parts = Counter[str]()
    for (part, kind), size in sizes.items():
        if kind != COPIES and (drafting or part != DRAFT):
            parts[part] += math.ceil(size / ranks.get(kind, 1))
    inner = parts.pop(LAYERS) * math.ceil(layers / spread.pipeline) // layers
    first = parts.pop(EMBEDDING)
    last = parts.total()
    return inner + (first + last if spread.pipeline == 1 else max(first, last))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Groups of layers with KV caches alike."""

    tokens: int  # of a block
    window: int | None
    count: int  # groups
    share: Fraction  # of the pool's block that a block in all these groups counts as

    def blocks(self, tokens: int, in_flight: int) -> int:
        """Of a request of so many tokens, in one group."""
        if self.window is None:
            return math.ceil(tokens / self.tokens)
        return math.ceil(min(self.window - 1 + in_flight, tokens) / self.tokens) + 1


@dataclass(frozen=True, kw_only=True)
class KvPool:
    """The KV cache of one GPU: ``groups`` of layers have blocks of their own from a common pool.

    vLLM 0.26.0, v1/core/kv_cache_utils.py:1525-1893 (groups, and bytes of a request).
    """

    block_bytes: int  # a block in all its layers, as counted before the start
    stored_bytes: int  # the same, as the pool stores it
    groups: tuple[Group, ...]
    in_flight: int  # tokens that are scheduled and not yet freed

    def bytes_of(self, tokens: int) -> int:
        """What a request of so many tokens needs at most."""
        blocks = sum(group.count * group.blocks(tokens, self.in_flight) for group in self.groups)
        return blocks * self.block_bytes

    def requests(self, available: int, tokens: int) -> float:
        """How many requests of so many tokens fit: the "maximum concurrency" of vLLM's log.

        0.26.0, v1/core/kv_cache_utils.py:937; 0.33.0:1061.
        """
        blocks = sum(group.share * group.blocks(tokens, self.in_flight) for group in self.groups)
        return available // self.stored_bytes / math.ceil(blocks)

    def longest(self, available: int, most: int) -> int:
        """The longest request, of at most ``most`` tokens, that fits into so many bytes; or 0."""
        lengths = range(1, most + 1)
        return bisect.bisect_right(lengths, available, key=self.bytes_of)


def kv_pool(rows: Sequence[KvCache], release: Version, spread: Parallel, in_flight: int) -> KvPool:
    """The pool of a model whose layers have these KV caches."""
    full = [row.page_bytes for row in rows if row.window is None]
    layers: dict[tuple[int, int | None], Counter[int]] = {}
    for row in rows:
        page = row.page_bytes
        if release < WIDEST:  # padded to a page of the layers without a window, or refused
            page = min((size for size in full if size >= page), default=page)
        count = math.ceil(row.layers / spread.pipeline)
        layers.setdefault((row.block_size, row.window), Counter())[page] += count
    counts = {key: max(pages.values()) for key, pages in layers.items()}
    least = max(counts[key] for key in layers if key[1] is None)
    # _approximate_gcd: the layers of a group for which all groups together are padded least.
    span = range(least, max(counts.values()) + 1)
    size = min(span, key=lambda n: (sum(-count % n for count in counts.values()), -n))
    number = {key: math.ceil(count / size) for key, count in counts.items()}
    parts = [  # of a group: page size -> layers that have it
        Counter({page: math.ceil(count / number[key]) for page, count in pages.items()})
        for key, pages in layers.items()
    ]
    if release >= WIDEST:
        block = stored = max(map(_bytes, parts))
        share = {key: Fraction(number[key]) for key in layers}
    else:
        widest = reduce(or_, parts)  # the most layers of each size
        block = max(widest.values()) * sum(widest)
        stored = _bytes(widest) if release >= PACKED else block
        first = next(_bytes(pages) for key, pages in layers.items() if key[1] is None)
        share = {key: Fraction(_bytes(pages), first) for key, pages in layers.items()}
    groups = tuple(
        Group(tokens=key[0], window=key[1], count=number[key], share=share[key]) for key in layers
    )
    return KvPool(block_bytes=block, stored_bytes=stored, groups=groups, in_flight=in_flight)


def _bytes(pages: Mapping[int, int]) -> int:
    return sum(page * count for page, count in pages.items())


@dataclass(frozen=True, kw_only=True)
class Memory:
    """One GPU of a deployment. ``pool`` is None if no recorded answer says what its KV cache is."""

    total: int  # as the driver counts it
    utilization: float
    weights: int
    max_model_len: int | None
    limit: int  # tokens of the model's longest context
    pool: KvPool | None

    @property
    def requested(self) -> int:
        """What vLLM takes for itself: it refuses to start if less is free.

        vLLM 0.26.0, v1/worker/utils.py:430 (0.22.1:408, 0.33.0:724).
        """
        return math.ceil(self.total * self.utilization)

    @property
    def kv_cache(self) -> int | None:
        """For one request of the longest context."""
        if self.pool is None or self.max_model_len is None:
            return None
        return self.pool.bytes_of(self.max_model_len)

    @property
    def left(self) -> int:
        """For activations, NCCL and CUDA graphs; negative if it cannot start."""
        return self.requested - self.weights - (self.kv_cache or 0)

    @property
    def longest(self) -> int | None:
        """No longer context can fit; None if it is not known."""
        available = self.requested - self.weights
        return None if self.pool is None else self.pool.longest(available, self.limit)

    @property
    def verdict(self) -> Level:
        """Red: it cannot start."""
        if self.left <= 0:
            return "red"
        return "ok" if self.left >= OVERHEAD and self.kv_cache is not None else "unknown"

    @property
    def seen(self) -> str:
        part = f"{self.utilization:g} is {_gib(self.requested)}"
        return f"{_gib(self.total)} per GPU, of which {part}"

    @property
    def needed(self) -> str:
        """The parts, and what remains for those that nobody measured."""
        kv = "a KV cache of unknown size (vLLM was not asked about these flags)"
        if self.pool is not None and self.max_model_len is None:
            kv = f"a KV cache for as many tokens as fit (at most {self.longest})"
        elif self.kv_cache is not None:
            kv = f"{_gib(self.kv_cache)} of KV cache for {self.max_model_len} tokens "
            kv += f"(at most {self.longest} fit)"
        text = f"{_gib(self.weights)} for the weights, {kv}"
        if self.left <= 0:
            return f"{text}, and more for activations and CUDA graphs"
        text += f"; {_gib(self.left)} are left for activations and CUDA graphs"
        return f"{text}, for which public runs took 5 to 12 GiB" if self.verdict != "ok" else text

    @property
    def text(self) -> str:
        return f"{self.verdict}: {self.seen}; {self.needed}"

    @property
    def remedy(self) -> str:
        """What to change; empty if it fits."""
        if self.verdict == "ok":
            return ""
        choices = ["a preset with more GPUs", "a smaller artifact"]
        if self.left > 0:
            return "; or ".join([f"if it does not start: a smaller {flags.LENGTH}", *choices])
        if self.longest:
            choices.insert(0, f"{flags.LENGTH} below {self.longest}")
        least = math.ceil((self.requested - self.left) / max(self.total, 1) * 100 + 1) / 100
        if least <= MOST_UTILIZATION:
            choices.insert(0, f"{flags.UTILIZATION} of at least {least:g}")
        return "; or ".join(choices)


def memory_of(
    *, artifact: str, words: Sequence[str], release: str, total: int, answer: Answer | None
) -> Memory | None:
    """Memory of one GPU under these arguments of ``vllm serve``.

    None without a manifest, and where a flag moves weights or sets the KV cache's size.

    ``answer``: of the line's vLLM about the artifact, if possible with these arguments. What they
    say of lengths and memory comes first, the answer's values are the defaults.
    """
    spread, found, version = flags.parallel(words), flags.values(words), Version(release)
    weights = weights_per_rank(artifact, spread, drafting=flags.drafter(words) is not None)
    if weights is None or any(name in found for name in flags.ELSEWHERE):
        return None
    engine = None if answer is None else answer.engine
    pool = length = None
    if answer is not None and engine is not None and answer.kv_cache:
        length = flags.length(found, engine.max_model_len)
        tokens = flags.number(found, "--max-num-batched-tokens", engine.max_num_batched_tokens)
        steps = spread.pipeline
        if "--no-async-scheduling" not in found:  # the default is with it
            steps = {"v2": steps + 1, "v1": max(steps, 2)}[engine.model_runner]
        in_flight = tokens * (steps if version >= IN_FLIGHT else 1)
        pool = kv_pool(answer.kv_cache, version, spread, in_flight)
    default = 0.92 if engine is None else engine.gpu_memory_utilization  # 0.26.0, config/cache.py
    return Memory(
        total=total, utilization=flags.share(found, default), weights=weights, pool=pool,
        max_model_len=length, limit=int(artifact_config(artifact)["max_position_embeddings"]),
    )  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
