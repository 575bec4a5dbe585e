"""The shape of matrix.toml."""

import re
from datetime import date
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from vllm_forge.matrix.flags import OURS, values

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Version = Annotated[str, Field(pattern=r"^\d+(\.\d+)+$")]
Arch = Annotated[str, Field(pattern=r"^sm_\d+[af]?$")]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]  # goes into one argument or line
RelativePath = Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)*$")]
# Variables that change how the loader, shells and Python start: those of glibc's list
# (sysdeps/generic/unsecvars.h), and of bash(1), sh(1) and python(1).
STEERING = re.compile(
    r"(LD_|PYTHON|BASH_).*|PATH|ENV|IFS|CDPATH|SHELLOPTS|GCONV_PATH|GETCONF_DIR|GLIBC_TUNABLES|"
    r"HOSTALIASES|LOCALDOMAIN|LOCPATH|MALLOC_TRACE|NIS_PATH|NLSPATH|RESOLV_HOST_CONF|RES_OPTIONS|"
    r"TMPDIR|TZDIR"
)


def _not_steering(name: str) -> str:
    if STEERING.fullmatch(name):
        raise ValueError(f"{name} changes how programs start: set it in docker/Dockerfile")
    return name


VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Environment = dict[Annotated[VariableName, AfterValidator(_not_steering)], Text]
# TOML has types: "288" is not a number and "yes" is not true, as the schema says too.
Integer = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Flag = Annotated[bool, Field(strict=True)]


class FrozenModel(BaseModel):
    """Base of records: immutable, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PinnedRequirement(FrozenModel):
    """A requirement that we add to, or override in, what uv would resolve."""

    requirement: Annotated[str, Field(pattern=r"^[A-Za-z0-9][^\x00-\x1f\x7f]*$")] = Field(
        description="PEP 508, e.g. nvidia-cuda-nvcc==13.0.88"
    )
    reason: str = Field(min_length=20, description="printed at lock time and into the lock")


class Sku(FrozenModel):
    """A product to serve on."""

    arch: Arch = Field(description="nvcc target, e.g. sm_100a")
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d$")]
    device: Text = Field(description="what the driver calls it")
    memory_gb: Count = Field(description="HBM or GDDR per GPU, 10^9 bytes, as the vendor states")
    development: Flag = Field(default=False, description="a proving ground, never released for")
    env: Environment = Field(
        default_factory=dict, description="set in the image; read by JIT compilers at run time"
    )

    @model_validator(mode="after")
    def _is_one_gpu(self) -> Self:
        of_arch = re.sub(r"^sm_(\d*)(\d)[af]?$", r"\1.\2", self.arch)
        compiled = self.env.get("TORCH_CUDA_ARCH_LIST", of_arch)
        if of_arch != self.compute_capability or of_arch not in compiled:
            named = f"{self.arch}, {self.compute_capability}, {compiled}"
            raise ValueError(f"arch, compute_capability and TORCH_CUDA_ARCH_LIST differ: {named}")
        return self


class GpuMemory(FrozenModel):
    """What the driver of a SKU reports, where that is not what the vendor states."""

    mib: Count = Field(description="memory.total of nvidia-smi, 2^20 bytes")
    source: str = Field(min_length=10, description="where that was seen")


class UnsupportedSku(FrozenModel):
    """A product that is asked for and that no line serves."""

    reason: str = Field(min_length=20, description="printed when it is asked for")


class Chat(FrozenModel):
    """What a line's vLLM makes of a chat with this model."""

    flags: tuple[Annotated[str, Field(pattern=r"^--[a-z][^\x00-\x1f\x7f]*$")], ...] = Field(
        description="parsers of tool calls and reasoning, added to presets that do not set them"
    )
    thinking: Flag = Field(description="whether a request that says nothing of it thinks")
    source: Annotated[str, Field(pattern=r"^vllm/\S+:\d+: .+$")] = Field(
        description="PATH:LINE: TEXT of the release that decides it"
    )


class Line(FrozenModel):
    """A pinned vLLM release with its lock, patches and toolchain."""

    vllm: Version
    torch: Version
    python: Annotated[str, Field(pattern=r"^3\.\d+$")] = Field(description="in the image")
    cuda: Annotated[str, Field(pattern=r"^\d+\.\d+$")] = Field(
        description="toolkit of the CUDA runtime and of the compilers in the lock"
    )
    lock: RelativePath = Field(description="hash-pinned requirements, made by `nox -s lock`")
    series: RelativePath = Field(description="folder with the series file and its patches")
    constraints: tuple[PinnedRequirement, ...] = ()
    overrides: tuple[PinnedRequirement, ...] = ()
    skus: tuple[Name, ...]
    unsupported: dict[Name, str] = Field(
        default_factory=dict, description="SKU -> why this line cannot serve it"
    )
    chat: Chat | None = None
    budget_mb: Count = Field(description="compressed size of the image, 10^6 bytes, at most")
    unimportable: dict[str, str] = Field(
        default_factory=dict,
        description="quantization module -> why it does not import without a GPU; stale rows fail",
    )


class Cuda(FrozenModel):
    """What a CUDA release asks of the host."""

    driver: Version = Field(description="oldest Linux driver")
    source: str = Field(description="where NVIDIA says so")


class KernelModules(FrozenModel):
    """Which flavour of NVIDIA's kernel modules drives a GPU."""

    open_from: Annotated[str, Field(pattern=r"^\d+\.\d$")] = Field(
        description="compute capability from which only the open modules do"
    )
    source: str = Field(description="where NVIDIA says so")


class Container(FrozenModel):
    """What a container that serves needs, beyond its GPUs."""

    shm_gb: Count = Field(
        description="size of its /dev/shm, 2^30 bytes; tensor-parallel workers and NCCL need it",
    )
    ulimits: tuple[Annotated[str, Field(pattern=r"^[a-z]+=-?\d+(:-?\d+)?$")], ...] = Field(
        description="name=value, as docker and podman take them"
    )
    port: Count = Field(lt=1 << 16, description="of the HTTP server")


class RetiredVariable(FrozenModel):
    """An environment variable that published commands set and that is no longer wanted."""

    effect: str = Field(min_length=20, description="what it does where vLLM still reads it")
    replacement: str = Field(min_length=3, description="what to write instead")
    source: str = Field(description="the change that removed it")


class LayerRule(FrozenModel):
    """One wheel layer: which distributions go in. First match wins; the last one takes the rest."""

    name: Name
    match: tuple[str, ...] = Field(description="fnmatch patterns of normalized names")
    code: Flag = Field(
        default=False,
        description="libraries with device code go into a layer per SKU, without foreign code",
    )


class WheelFile(FrozenModel):
    """Files of wheels that an image is otherwise refused for."""

    path: str = Field(description="fnmatch pattern, below site-packages")
    wheels: tuple[Name, ...] = Field(min_length=1, description="all that bring such a file")
    lines: tuple[Name, ...] = Field(min_length=1, description="rows that no file needs fail")
    reason: str = Field(min_length=20)


class Base(FrozenModel):
    """The operating system of the image."""

    suite: Name = Field(description="Debian suite that the rootfs is made from")
    packages: tuple[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9+.-]+$")], ...] = Field(
        description="Debian packages that must be in the image"
    )
    lock: Annotated[str, Field(pattern=r"^[\w./-]+\.txt$")] | None = Field(
        default=None, description="lock of all Debian packages; unset: the archive's current ones"
    )
    snapshots: tuple[Annotated[str, Field(pattern=r"^https?://[^\s@]+$")], ...] = Field(
        default=(), description="archives that keep old packages, by {date}; asked last"
    )
    platform: Name = Field(description="uv's name for the wheel platform")
    source_date_epoch: Integer = Field(
        ge=0, lt=1 << 32, description="timestamp of every file that we write"
    )
    budget_mb: Count = Field(description="compressed size of rootfs plus system layer, 10^6 bytes")


class Unserved(FrozenModel):
    """Lines that do not serve an artifact. Lint fails when a row is not so, or is missing."""

    lines: tuple[Name, ...] = Field(min_length=1)
    skus: tuple[Name, ...] = Field(default=(), description="only these; empty: all")
    drafting: Flag = Field(default=False, description="only with speculative decoding")
    reason: str = Field(min_length=20)


class Artifact(FrozenModel):
    """A checkpoint family."""

    repo: Annotated[str, Field(pattern=r"^\w[\w.-]*/\w[\w.-]*$")] = Field(
        description="owner/name on the model hub"
    )
    experts: Literal["nvfp4", "w4a16", "mxfp4"]
    attention: Literal["fp8-block", "bf16"]
    mtp: Literal["bf16", "fp8", "mxfp4", "none"] = Field(
        description="as the draft layer's experts are stored"
    )
    drafter: Literal["mtp", "dspark"] = Field(default="mtp", description="what is stored as mtp.*")
    block: Count | None = Field(
        default=None, description="tokens that a DSpark drafter drafts at once: dspark_block_size"
    )
    unasked: str | None = Field(
        default=None,
        min_length=20,
        description="what is not known of its config.json, so that no vLLM is asked and no preset "
        "may serve it",
    )
    size_gb: Count | None = Field(default=None, description="10^9 bytes; unset: not known")
    shards: Count | None = Field(default=None, description="safetensors files; unset: not known")
    identity: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="what `python -m tests.gpu.harness.identity DIR` prints of it; unset: nobody "
        "pinned it, and no preset counts as run with it",
    )
    unserved: tuple[Unserved, ...] = ()

    def why_not(self, line: str, sku: str, *, drafting: bool) -> str | None:
        """Why a line does not serve it, with or without speculative decoding; None if it does."""
        for row in self.unserved:
            if line in row.lines and sku in (row.skus or (sku,)) and (drafting or not row.drafting):
                return row.reason
        return None

    def why_not_drafted(self, method: str, tokens: int) -> str:
        """Why its drafter does not draft like that, "" if it does."""
        if self.mtp == "none":
            return "has no MTP block"
        if method != self.drafter:
            return f"has a drafter for method {self.drafter}, not {method}"
        # vLLM asks for a block or more (0.26.0, config/speculative.py:1004), or nothing (0.33.0).
        if method == "dspark" and tokens != self.block:
            return f"drafts blocks of {self.block} tokens, not {tokens}: few would be accepted"
        return ""


class Preset(FrozenModel):
    """A way to serve artifacts on a SKU. Its name is the SKU's, a dash, and a short name."""

    sku: Name
    artifacts: tuple[Name, ...] = Field(min_length=1, description="the first is the default")
    tensor_parallel: Count = Field(description="GPUs that one replica is spread over")
    speculative_tokens: Integer = Field(
        default=0, ge=0, description="drafted tokens, k; 0 = off; of DSpark the artifact's block"
    )
    speculative_method: Literal["mtp", "dspark"] = "mtp"
    flags: tuple[Annotated[str, Field(pattern=r"^--[a-z][^\x00-\x1f\x7f]*$")], ...] = Field(
        default=(), description="of `vllm serve`, each with its value in one word: --name=value"
    )
    env: Environment = Field(default_factory=dict)
    note: str = Field(min_length=20, description="where its values come from; printed with it")

    @model_validator(mode="after")
    def _says_nothing_twice(self) -> Self:
        if taken := sorted(values(self.flags).keys() & {"--tensor-parallel-size", *OURS}):
            raise ValueError(f"flags: {', '.join(taken)}: set by the row's keys, or by serve")
        return self


class Gate(FrozenModel):
    """What an image may lose against another one in a benchmark."""

    measure: Literal["score", "throughput", "acceptance", "positions"]
    score: Name | None = Field(default=None, description="scorer, for measure score")
    per: Literal["server", "gpu"] = Field(
        default="server", description="for measure throughput: tokens a second of what"
    )
    margin: float = Field(
        gt=0,
        lt=1,
        description="largest loss: a share of items, of the rate, of drafted tokens, of drafts",
    )

    @model_validator(mode="after")
    def _names_its_score(self) -> Self:
        if (self.measure == "score") != (self.score is not None):
            raise ValueError("score: a scorer for measure score, and for no other")
        if self.per == "gpu" and self.measure != "throughput":
            raise ValueError("per: gpu is for measure throughput")
        return self

    @property
    def unit(self) -> str:
        """Of the margin and of differences: percent of a rate, or percentage points of a share."""
        return "%" if self.measure == "throughput" else "pp"


Stage = Literal["dev", "candidate", "release"]


class ReleasePolicy(FrozenModel):
    """What an image needs before a registry gives it a name of a stage."""

    statements: tuple[Literal["provenance", "sbom", "vex"], ...] = Field(
        default=(), description="signed and attached to the image"
    )
    builders: Count = Field(
        default=1, description="independent signers of provenance for the one digest"
    )
    committed: Flag = Field(
        default=False, description="a checkout without changes, and locked Debian packages"
    )
    proofs: Flag = Field(default=False, description="each patch is proven on this series and lock")
    upstream: Flag = Field(default=False, description="vLLM's own tests, without a regression")
    kernels: Flag = Field(
        default=False, description="recorded kernel selection and coverage of this series and lock"
    )
    archives: Literal["carried", "network"] | None = Field(
        default=None,
        description="which variant of an image whose presets need kernel archives: it carries them "
        "(build --kernels), or FlashInfer downloads them at the first start; null: either",
    )
    tiers: tuple[Name, ...] = Field(
        default=(), description="of the GPU suite, each with a signed receipt of this digest"
    )
    max_age_days: Count | None = Field(
        default=None, description="of builds and receipts when the name is given"
    )


class Matrix(FrozenModel):
    """All of matrix.toml."""

    schema_version: Literal[1]
    default_line: Name
    base: Base
    container: Container
    cuda: dict[str, Cuda]
    kernel_modules: KernelModules | None = None
    retired: dict[VariableName, RetiredVariable] = Field(
        default_factory=dict, description="environment variable -> what to write instead"
    )
    layers: tuple[LayerRule, ...]
    wheel_file: tuple[WheelFile, ...] = ()
    sku: dict[Name, Sku]
    unsupported_sku: dict[Name, UnsupportedSku] = Field(default_factory=dict)
    gpu_memory: dict[Name, GpuMemory] = Field(
        default_factory=dict, description="SKU -> what its driver reports; else sku.memory_gb"
    )
    line: dict[Name, Line]
    artifact: dict[Name, Artifact]
    preset: dict[Name, Preset]
    release: dict[Stage, ReleasePolicy] = Field(
        default_factory=dict, description="stage -> what it needs; an unlisted stage is refused"
    )
    gate: dict[Name, Gate] = Field(
        default_factory=dict, description="what `bench gate` compares, and how much may be lost"
    )
    # Not in Line, whose rows are inputs of images.
    support: dict[Name, date] = Field(
        default_factory=dict,
        description="line -> last day on which it gets fixes; an unlisted line: not stated",
    )

    @model_validator(mode="after")
    def _rows_agree(self) -> Self:
        self._require("default_line", "line", self.default_line)
        if both := set(self.sku) & set(self.unsupported_sku):
            raise ValueError(f"unsupported_sku: also in [sku]: {sorted(both)}")
        for name, line in self.line.items():
            if line.cuda not in self.cuda:
                raise ValueError(f"line.{name}: no [cuda.{line.cuda!r}] with its driver")
            self._require(f"line.{name}", "sku", *line.skus, *line.unsupported)
            if both := set(line.skus) & set(line.unsupported):
                raise ValueError(f"line.{name}: both supported and not: {sorted(both)}")
            if neither := set(self.sku) - set(line.skus) - set(line.unsupported):
                raise ValueError(
                    f"line.{name}: say in skus or in unsupported what holds for {sorted(neither)}"
                )
        for row in self.wheel_file:
            self._require(f"wheel_file {row.path}", "line", *row.lines)
        self._require("gpu_memory", "sku", *self.gpu_memory)
        self._presets_agree()
        self._require("support", "line", *self.support)
        if not self.layers or self.layers[-1].match != ("*",):
            raise ValueError('layers: the last one must match ["*"]')
        return self

    def support_end(self, line: str) -> str:
        """The last day of support, as notes and report say it."""
        return str(self.support.get(line, "not stated"))

    def _presets_agree(self) -> None:
        for name, artifact in self.artifact.items():
            for unserved in artifact.unserved:
                self._require(f"artifact.{name}.unserved", "line", *unserved.lines)
                self._require(f"artifact.{name}.unserved", "sku", *unserved.skus)
        for name, preset in self.preset.items():
            self._require(f"preset.{name}", "sku", preset.sku)
            self._require(f"preset.{name}", "artifact", *preset.artifacts)
            if not name.startswith(f"{preset.sku}-"):
                raise ValueError(f"preset.{name}: the name must start with {preset.sku}-")
            for each in preset.artifacts:
                if problem := self._not_for(preset, self.artifact[each]):
                    raise ValueError(f"preset.{name}: {each} {problem}")

    @staticmethod
    def _not_for(preset: Preset, artifact: Artifact) -> str:
        """Why a preset cannot name an artifact, "" if it can."""
        if artifact.unasked is not None:
            return f"is not served: {artifact.unasked}"
        drafted = preset.speculative_tokens
        return artifact.why_not_drafted(preset.speculative_method, drafted) if drafted else ""

    def memory_of(self, sku_name: str) -> int:
        """Bytes of a GPU, as its driver reports them or its vendor states."""
        row = self.gpu_memory.get(sku_name)
        return self.sku[sku_name].memory_gb * 10**9 if row is None else row.mib << 20

    def _require(self, place: str, table: str, *names: str) -> None:
        for name in names:
            if name not in getattr(self, table):
                raise ValueError(f"{place}: no [{table}.{f'{name!r}' if '.' in name else name}]")
