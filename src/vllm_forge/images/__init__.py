"""Images: layers from wheels, a system from an engine, one checked OCI layout per cell."""

from vllm_forge.images.assembly import patched_wheel
from vllm_forge.images.build import (
    BuildResult,
    build_image,
    build_layers,
    build_steps,
    build_system,
)
from vllm_forge.images.engines import choose_engine, provision
from vllm_forge.images.layout import Image, read_image, verify
from vllm_forge.images.plan import BuildOptions, ImagePlan, resolve

__all__ = [
    "BuildOptions",
    "BuildResult",
    "Image",
    "ImagePlan",
    "build_image",
    "build_layers",
    "build_steps",
    "build_system",
    "choose_engine",
    "patched_wheel",
    "provision",
    "read_image",
    "resolve",
    "verify",
]
