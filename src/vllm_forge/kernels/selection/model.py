"""Questions to a line's vLLM and its answers: the keys of records/selection/<line>.json.

A question is a declared device, an artifact's config.json and the arguments of ``vllm serve``. The
answer is what that vLLM's own code selects for them, as far as it can be known without a GPU. A
question that vLLM refuses has an answer too: ``Answer.refused``.
"""

import re
from typing import Literal

from pydantic import Field

from vllm_forge.matrix import FrozenModel

# ffn.experts up to 0.22.1, ffn.experts.routed_experts later.
EXPERTS = re.compile(r"\.ffn\.experts(\.routed_experts)?$")


class Device(FrozenModel):
    """A SKU's GPUs, as the stub driver declares them."""

    name: str
    compute_capability: str  # e.g. 10.3
    memory_bytes: int  # per GPU
    count: int = Field(ge=1)  # GPUs that the process sees


class Question(FrozenModel):
    name: str  # preset/<preset>/<artifact>, or grid/<sku>/<artifact>[/<variable>]
    device: Device
    artifact: str  # name of a file in kernels/selection/artifacts
    arguments: tuple[str, ...] = ()  # of `vllm serve`, without the model; as serve/ writes them
    environment: dict[str, str] = Field(default_factory=dict)


class RejectedCandidate(FrozenModel):
    """A candidate that vLLM passed over."""

    candidate: str  # backend or kernel class
    reason: str  # as vLLM logs it; one line


class Choice(FrozenModel):
    """What one of vLLM's selections chose, and what it passed over."""

    chosen: str | None  # backend or class; None if nothing fits
    kernel: str | None = None  # class that does the work
    rejected: tuple[RejectedCandidate, ...] = ()
    error: str | None = None  # what vLLM raised if nothing fits


class Moe(Choice):
    """The routed experts. ``clamp`` is about swiglu_limit, which bounds both halves of SwiGLU.

    ``reaches``: the limit arrives at the kernel; ``lost``: the model has one and the kernel gets
    none, so results are wrong beyond it; ``none``: no backend, or a model without a limit.
    """

    clamp: Literal["reaches", "lost", "none"] = "none"
    limit: float | None = None  # what the kernel gets
    without_limit: str | None = None  # what would be chosen for a model that sets no limit


class Layers(FrozenModel):
    """Layers of the target or of the draft model."""

    # Module name, * for the layer -> quantization scheme class.
    modules: dict[str, str] = Field(default_factory=dict)
    moe: Moe | None = None

    @property
    def experts_scheme(self) -> str | None:
        names = self.modules.items()
        return next((scheme for name, scheme in names if EXPERTS.search(name)), None)


class Draft(Layers):
    """The MTP draft layer, where speculative decoding is on."""

    architecture: str
    speculative_tokens: int  # k, as vLLM took it


class KvCache(FrozenModel):
    """Layers with a KV cache of one shape, on one GPU."""

    layers: int
    kind: str  # class of vLLM's KVCacheSpec
    block_size: int  # tokens per block
    page_bytes: int  # bytes per block and layer
    window: int | None  # tokens that are kept; None: all


class CudaGraphs(FrozenModel):
    """The sizes that vLLM resolves from flags, k and the scheduler's limits."""

    mode: str  # e.g. FULL_AND_PIECEWISE
    sizes: tuple[int, ...]  # tokens of the graphs that decode batches run in, ascending
    # --cudagraph-capture-sizes after all of vLLM's defaults and roundings.
    capture_sizes: tuple[int, ...]
    needed: int  # max_num_seqs * (k + 1): tokens of a full decode batch
    covers: bool  # the largest of sizes holds a full decode batch


class Engine(FrozenModel):
    """Engine settings after all of vLLM's defaults."""

    tensor_parallel: int
    expert_parallel: bool
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    kv_cache_dtype: str  # as the attention layers store it, e.g. fp8_ds_mla
    block_size: int  # tokens per KV block
    quantization: str | None
    dtype: str
    prefix_caching: bool
    model_runner: Literal["v1", "v2"]


class Refusal(FrozenModel):
    """vLLM does not serve this."""

    # config: it refuses to make a configuration or a model of them; device: no attention or
    # kernels for it; failed: this project's code raised inside, a bug to fix.
    kind: Literal["arguments", "config", "device", "failed"]
    message: str


class Answer(Layers):
    """The answer to a question. After a refusal, later fields are None or empty."""

    name: str  # of the question
    refused: Refusal | None = None
    # VLLM_* variables that this vLLM does not have: no effect.
    unknown_environment: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # what vLLM warned of while it made its configuration
    engine: Engine | None = None
    cuda_graphs: CudaGraphs | None = None
    kv_cache: tuple[KvCache, ...] = ()
    attention: Choice | None = None
    linear: Choice | None = None  # FP8-block linear layers
    draft: Draft | None = None
