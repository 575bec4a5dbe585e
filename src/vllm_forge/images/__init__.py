"""Images: layers from wheels, a system from an engine, one checked OCI layout per cell."""

from vllm_forge.images.build import Build, BuildOptions, Built, patched_wheel
from vllm_forge.images.choose import choose_engine
from vllm_forge.images.layout import Image, read_image, verify
from vllm_forge.images.provision import provision

__all__ = [
    "Build",
    "BuildOptions",
    "Built",
    "Image",
    "choose_engine",
    "patched_wheel",
    "provision",
    "read_image",
    "verify",
]
