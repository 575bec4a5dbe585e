"""How a linear layer's weight is stored: the tensors of each format, and which format is there.

Suffixes, dtypes and shapes are those that vLLM registers for the same scheme:
compressed_tensors_moe_w4a4_nvfp4.py, compressed_tensors_w8a8_fp8.py, compressed_tensors_moe_wna16
of vllm/model_executor/layers/quantization/compressed_tensors, and modelopt.py, fp8.py, mxfp4.py
beside it (0.22.1, 0.26.0, 0.33.0). DeepSeek's own ``.scale`` is renamed by its loaders
(models/deepseek_v4/nvidia/model.py, `_make_deepseek_v4_weights_mapper`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from vllm_forge.checkpoints.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Shape = tuple[int, ...]


class Format(StrEnum):
    """How a weight is stored."""

    PLAIN = "plain"
    NVFP4 = "nvfp4"
    MODELOPT_NVFP4 = "modelopt-nvfp4"
    W4A16 = "w4a16"
    FP8_BLOCK = "fp8-block"
    FP8_NATIVE = "fp8-native"
    MXFP4_NATIVE = "mxfp4-native"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One stored tensor of a weight.

    Attributes:
        suffix: after the module's name, e.g. ``weight_scale``.
        dtypes: safetensors names that are right; the first one is what our tools write.
        shape: from the weight's rows and columns.
        optional: some writers leave it out.
        converted: dtypes that are not right, and that vLLM's copy turns into the right one without
            a change of meaning (docs/operate/checkpoints.md, verdict.KEEP).
    """

    suffix: str
    dtypes: tuple[str, ...]
    shape: Callable[[int, int], Shape]
    optional: bool = False
    converted: tuple[str, ...] = ()


def _up(number: int, block: int) -> int:
    return -(-number // block)


def _scalar(_rows: int, _columns: int) -> Shape:
    return ()


def _blocks(rows: int, columns: int) -> Shape:
    return (_up(rows, 128), _up(columns, 128))


# Global scales are scalars. Lists of one element are taken too (tests/patches/
# test_global_scale_shape.py); the difference is reported, see checks_tensors.py.
HALF = ("BF16", "F16")
PIECES: dict[Format, tuple[Piece, ...]] = {
    Format.PLAIN: (Piece(suffix="weight", dtypes=("BF16", "F32"), shape=lambda n, k: (n, k)),),
    Format.NVFP4: (
        Piece(
            suffix="weight_packed", dtypes=("U8",), shape=lambda n, k: (n, _up(k, 2)),
            converted=("I8",),
        ),
        Piece(suffix="weight_scale", dtypes=("F8_E4M3",), shape=lambda n, k: (n, _up(k, 16))),
        Piece(suffix="weight_global_scale", dtypes=("F32",), shape=_scalar, converted=HALF),
        Piece(
            suffix="input_global_scale", dtypes=("F32",), shape=_scalar, optional=True,
            converted=HALF,
        ),
    ),
    Format.MODELOPT_NVFP4: (
        Piece(suffix="weight", dtypes=("U8",), shape=lambda n, k: (n, _up(k, 2))),
        Piece(suffix="weight_scale", dtypes=("F8_E4M3",), shape=lambda n, k: (n, _up(k, 16))),
        Piece(suffix="weight_scale_2", dtypes=("F32",), shape=_scalar),
        Piece(suffix="input_scale", dtypes=("F32",), shape=_scalar),
    ),
    Format.W4A16: (
        Piece(suffix="weight_packed", dtypes=("I32",), shape=lambda n, k: (n, _up(k, 8))),
        Piece(suffix="weight_scale", dtypes=("BF16",), shape=lambda n, k: (n, _up(k, 128))),
        Piece(suffix="weight_shape", dtypes=("I64", "I32"), shape=lambda _n, _k: (2,)),
    ),
    Format.FP8_BLOCK: (
        Piece(suffix="weight", dtypes=("F8_E4M3",), shape=lambda n, k: (n, k)),
        Piece(
            suffix="weight_scale", dtypes=("F32", "BF16"), shape=_blocks,
            converted=("F16", "F8_E8M0"),
        ),
    ),
    Format.FP8_NATIVE: (
        Piece(suffix="weight", dtypes=("F8_E4M3",), shape=lambda n, k: (n, k)),
        Piece(suffix="scale", dtypes=("F8_E8M0", "F32"), shape=_blocks),
    ),
    Format.MXFP4_NATIVE: (
        Piece(suffix="weight", dtypes=("I8", "U8"), shape=lambda n, k: (n, _up(k, 2))),
        Piece(
            suffix="scale", dtypes=("F8_E8M0",), shape=lambda n, k: (n, _up(k, 32)),
            converted=("U8",),
        ),
    ),
}  # fmt: skip
SUFFIXES = frozenset(piece.suffix for pieces in PIECES.values() for piece in pieces) | {
    "weight_scale_inv",
    "weight_zero_point",
    "weight_g_idx",
}


@dataclass(frozen=True, kw_only=True)
class RequiredTensor(TensorSpec):
    """A tensor that a format stores; ``alternatives`` to its dtype are right too. See Piece."""

    alternatives: tuple[str, ...] = ()
    optional: bool = False
    converted: tuple[str, ...] = ()

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that are right; the first one is what our tools write."""
        return (self.dtype, *self.alternatives)


def stored_as(tensor: TensorSpec, kind: Format) -> Iterator[RequiredTensor]:
    """The stored tensors of a weight of the unquantized model (``tensor`` is [rows, columns])."""
    rows, columns = tensor.shape
    module = tensor.name.removesuffix(".weight")
    for piece in PIECES[kind]:
        dtype, *alternatives = (tensor.dtype,) if kind is Format.PLAIN else piece.dtypes
        yield RequiredTensor(
            name=f"{module}.{piece.suffix}",
            dtype=dtype,
            alternatives=tuple(alternatives),
            shape=piece.shape(rows, columns),
            optional=piece.optional,
            converted=piece.converted,
        )


def split(name: str) -> tuple[str, str]:
    """A tensor's module and its suffix; no suffix for names like ``attn.attn_sink``."""
    module, _, suffix = name.rpartition(".")
    return (module, suffix) if suffix in SUFFIXES else (name, "")


def recognize(dtypes: Mapping[str, str]) -> Format:
    """The format of a module, from the dtype of each of its suffixes.

    Told by what vLLM would read, so that a faulty scale does not change the answer.
    """
    weight = dtypes.get("weight")
    if "weight_packed" in dtypes:
        return Format.W4A16 if dtypes["weight_packed"] == "I32" else Format.NVFP4
    if "weight_scale_2" in dtypes:
        return Format.MODELOPT_NVFP4
    if weight == "F8_E4M3":
        return Format.FP8_NATIVE if "scale" in dtypes else Format.FP8_BLOCK
    if weight in {"I8", "U8"}:
        return Format.MXFP4_NATIVE
    if weight in {"BF16", "F32", "F16"} and not {"scale", "weight_scale"} & dtypes.keys():
        return Format.PLAIN
    return Format.UNKNOWN
