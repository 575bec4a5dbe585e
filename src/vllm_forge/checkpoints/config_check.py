"""Whether a config.json can be reasoned about: its keys have the types that everything else takes.

A config that lies about sizes is found out by its tensors; one whose sizes are words, negative or
absurd would end in a traceback, or fill the memory. Limits are far above any model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.inventory import MODEL_TYPE
from vllm_forge.host import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST = 1 << 24
MOST_EXPERTS = 1 << 18  # of all layers
SHOWN = 5  # problems


def _one_line(text: str) -> str:
    if not text.isprintable():  # messages show it
        raise ValueError("expected printable characters")
    return text


def _scalar(value: Any) -> Any:
    if isinstance(value, list | dict):
        raise ValueError("expected a name, a number or a truth value")  # noqa: TRY004 - of pydantic
    return value


Size = Annotated[int, Field(ge=1, le=MOST)]
Text = Annotated[str, AfterValidator(_one_line)]
Scalar = Annotated[Any, AfterValidator(_scalar)]


class _Keys(BaseModel):
    """Keys that are read; others may be anything."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Scheme(_Keys):
    """``weights`` or ``input_activations`` of a group."""

    strategy: Scalar = None
    type: Scalar = None
    actorder: Scalar = None
    dynamic: Scalar = None


class Group(_Keys):
    """One of ``config_groups``."""

    targets: list[Text] | None = None
    weights: Scheme | None = None
    input_activations: Scheme | None = None
    format: str | None = None


class Quantization(_Keys):
    """``quantization_config``."""

    quant_method: str | None = None
    format: str | None = None
    moe_quant_algo: str | None = None
    ignore: list[Text] | None = None
    config_groups: dict[Text, Group] | None = None


class Config(_Keys):
    """config.json of DeepSeek V4."""

    compress_ratios: list[int]
    hc_mult: int = Field(ge=1, le=64)
    head_dim: Size
    hidden_size: Size
    index_head_dim: Size
    index_n_heads: Size
    moe_intermediate_size: Size
    n_routed_experts: int = Field(ge=1, le=4096)
    n_shared_experts: int = Field(ge=1, le=64)
    num_attention_heads: Size
    num_experts_per_tok: int = Field(ge=1, le=4096)
    num_hash_layers: int = Field(ge=0, le=1024)
    num_hidden_layers: int = Field(ge=1, le=1024)
    num_nextn_predict_layers: int = Field(ge=0, le=16)
    o_groups: Size
    o_lora_rank: Size
    q_lora_rank: Size
    vocab_size: Size
    dspark_target_layer_ids: list[int] = Field(default=[], min_length=1)
    dspark_markov_rank: Size | None = None
    quantization_config: Quantization | None = None
    compression_config: Quantization | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        layers, experts = self.num_hidden_layers, self.n_routed_experts
        if layers * experts > MOST_EXPERTS:
            raise ValueError(f"{layers} layers of {experts} experts are beyond any model")
        if len(self.compress_ratios) < layers:
            raise ValueError(
                f"compress_ratios has {len(self.compress_ratios)} entries for {layers} layers"
            )
        if self.dspark_target_layer_ids and self.dspark_markov_rank is None:
            raise ValueError("dspark_target_layer_ids without dspark_markov_rank")
        return self


REQUIRED = tuple(name for name, field in Config.model_fields.items() if field.is_required())


def require_deepseek_v4(config: Mapping[str, Any], where: str) -> None:
    """Refuse the config of another model, or one that cannot be right.

    Raises:
        CheckpointUnreadableError: it is one of these; with the first problems.
    """
    if (kind := config.get("model_type")) != MODEL_TYPE:
        raise CheckpointUnreadableError(
            f"model_type is {kind!r}, not {MODEL_TYPE!r}",
            where=where,
            remedy="give a DeepSeek V4 checkpoint",
        )
    try:
        Config.model_validate(dict(config))
    except ValidationError as error:
        problems = [
            printable(": ".join([".".join(map(str, row["loc"])), row["msg"]][not row["loc"] :]))
            for row in error.errors(include_url=False, include_input=False)
        ]
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointUnreadableError(
            f"invalid config.json: {'; '.join(problems[:SHOWN])}{more}",
            where=where,
            remedy="take it from the source model",
        ) from None
