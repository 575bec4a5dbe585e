"""matrix.toml, parsed once into frozen records."""

from vllm_forge.matrix.cells import ImageCell, image_cell, serve_arguments
from vllm_forge.matrix.load import find_root, load, schema_text
from vllm_forge.matrix.model import (
    Artifact,
    Base,
    FrozenModel,
    LayerRule,
    Line,
    Matrix,
    PinnedRequirement,
    Preset,
    Sku,
)

__all__ = [
    "Artifact",
    "Base",
    "FrozenModel",
    "ImageCell",
    "LayerRule",
    "Line",
    "Matrix",
    "PinnedRequirement",
    "Preset",
    "Sku",
    "find_root",
    "image_cell",
    "load",
    "schema_text",
    "serve_arguments",
]
