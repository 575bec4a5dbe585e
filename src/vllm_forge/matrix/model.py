"""The shape of matrix.toml. Unknown keys are refused; records are frozen."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Version = Annotated[str, Field(pattern=r"^\d+(\.\d+)+$")]
Arch = Annotated[str, Field(pattern=r"^sm_\d+[af]?$")]
# TOML has types: "288" is not a number and "yes" is not true, as the schema says too.
Integer = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]


class Row(BaseModel):
    """Base of every record of the matrix."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PinnedRequirement(Row):
    """A requirement that we add to, or override in, what uv would resolve."""

    requirement: str = Field(description="PEP 508, e.g. nvidia-cuda-nvcc==13.0.88")
    reason: str = Field(min_length=20, description="printed at lock time and into the lock")


class Sku(Row):
    """A product to serve on."""

    arch: Arch = Field(description="nvcc target, e.g. sm_100a")
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d$")]
    device: str = Field(description="what the driver calls it")
    memory_gb: Integer = Field(description="HBM or GDDR per GPU, 10^9 bytes, as the vendor states")
    development: Flag = Field(default=False, description="a proving ground, never released for")
    env: dict[str, str] = Field(
        default_factory=dict, description="set in the image; read by JIT compilers at run time"
    )


class Line(Row):
    """A pinned vLLM release with its lock, patches and toolchain."""

    vllm: Version
    torch: Version
    python: Annotated[str, Field(pattern=r"^3\.\d+$")] = Field(description="in the image")
    cuda: Annotated[str, Field(pattern=r"^\d+\.\d+$")] = Field(
        description="toolkit of the CUDA runtime and of the compilers in the lock"
    )
    lock: str = Field(description="hash-pinned requirements, made by `nox -s lock`")
    series: str = Field(description="folder with the series file and its patches")
    constraints: tuple[PinnedRequirement, ...] = ()
    overrides: tuple[PinnedRequirement, ...] = ()
    skus: tuple[Name, ...]
    unsupported: dict[Name, str] = Field(
        default_factory=dict, description="SKU -> why this line cannot serve it"
    )
    budget_mb: Integer = Field(description="compressed size of the image, 10^6 bytes, at most")
    unimportable: dict[str, str] = Field(
        default_factory=dict,
        description="quantization module -> why it does not import without a GPU; stale rows fail",
    )


class LayerRule(Row):
    """One wheel layer: which distributions go in. First match wins; the last one takes the rest."""

    name: Name
    match: tuple[str, ...] = Field(description="fnmatch patterns of normalized names")


class Base(Row):
    """The operating system of the image."""

    suite: str = Field(description="Debian suite that the rootfs is made from")
    packages: tuple[str, ...] = Field(description="Debian packages that must be in the image")
    platform: str = Field(description="uv's name for the wheel platform")
    source_date_epoch: Integer = Field(description="timestamp of every file that we write")
    budget_mb: Integer = Field(
        description="compressed size of rootfs plus system layer, 10^6 bytes"
    )


class Artifact(Row):
    """A checkpoint family."""

    repo: str = Field(description="owner/name on the model hub")
    experts: Literal["nvfp4", "w4a16", "mxfp4"]
    attention: Literal["fp8-block", "bf16"]
    mtp: Literal["bf16", "fp8", "none"]
    size_gb: Integer | None = None


class Preset(Row):
    """A way to serve an artifact on a SKU."""

    sku: Name
    artifact: Name
    tensor_parallel: Integer = Field(ge=1, description="GPUs that one replica is spread over")
    speculative_tokens: Integer = Field(default=0, ge=0, description="k of MTP; 0 = off")
    flags: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)


class Matrix(Row):
    """All of matrix.toml."""

    schema_version: Literal[1]
    default_line: Name
    base: Base
    layers: tuple[LayerRule, ...]
    sku: dict[Name, Sku]
    line: dict[Name, Line]
    artifact: dict[Name, Artifact]
    preset: dict[Name, Preset]

    @model_validator(mode="after")
    def _rows_agree(self) -> Matrix:
        if self.default_line not in self.line:
            raise ValueError(f"default_line: no [line.{self.default_line!r}]")
        for name, line in self.line.items():
            for sku in (*line.skus, *line.unsupported):
                if sku not in self.sku:
                    raise ValueError(f"line.{name}: no [sku.{sku}]")
            if both := set(line.skus) & set(line.unsupported):
                raise ValueError(f"line.{name}: both supported and not: {sorted(both)}")
            if neither := set(self.sku) - set(line.skus) - set(line.unsupported):
                raise ValueError(
                    f"line.{name}: say in skus or in unsupported what holds for {sorted(neither)}"
                )
        for name, preset in self.preset.items():
            if preset.sku not in self.sku:
                raise ValueError(f"preset.{name}: no [sku.{preset.sku}]")
            if preset.artifact not in self.artifact:
                raise ValueError(f"preset.{name}: no [artifact.{preset.artifact}]")
        if not self.layers or self.layers[-1].match != ("*",):
            raise ValueError('layers: the last one must match ["*"]')
        return self
