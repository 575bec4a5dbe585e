"""Images: layers from wheels, a system from an engine, one checked OCI layout per cell."""

from vllm_forge.images.build import (
    build_image,
    build_steps,
    build_system,
    patched_wheel,
    write_layers,
)
from vllm_forge.images.engines import choose_engine, provision
from vllm_forge.images.layout import Image, read_image, verify
from vllm_forge.images.plan import BuildOptions, ImagePlan, resolve

__all__ = [
    "BuildOptions",
    "Image",
    "ImagePlan",
    "build_image",
    "build_steps",
    "build_system",
    "choose_engine",
    "patched_wheel",
    "provision",
    "read_image",
    "resolve",
    "verify",
    "write_layers",
]
