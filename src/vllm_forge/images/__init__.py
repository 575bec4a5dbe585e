"""Images: layers from wheels, a system from an engine, one checked OCI layout per cell."""

from vllm_forge.images.assembly import patched_wheel
from vllm_forge.images.build import Build, Built, build_image
from vllm_forge.images.engines import choose_engine
from vllm_forge.images.layout import Image, read_image, verify
from vllm_forge.images.plan import BuildOptions, ImagePlan, resolve
from vllm_forge.images.provision import provision

__all__ = [
    "Build",
    "BuildOptions",
    "Built",
    "Image",
    "ImagePlan",
    "build_image",
    "choose_engine",
    "patched_wheel",
    "provision",
    "read_image",
    "resolve",
    "verify",
]
