"""matrix.toml, parsed once into frozen records."""

from vllm_forge.matrix.cells import (
    ImageCell,
    find_root,
    gpus_of,
    image_cell,
    load,
    serve_arguments,
)
from vllm_forge.matrix.model import (
    Artifact,
    Base,
    FrozenModel,
    Gate,
    KernelModules,
    Line,
    Matrix,
    Preset,
    Sku,
)
