"""Images: layers from wheels, a system from an engine, one checked OCI layout per cell."""

from vllm_forge.images.build import build_image, build_steps, patched_wheel
from vllm_forge.images.engines import choose_engine
from vllm_forge.images.layout import Image, read_image, verify
from vllm_forge.images.plan import BuildOptions, ImagePlan, resolve
from vllm_forge.images.system import build_system
from vllm_forge.images.tools import provision
from vllm_forge.images.wheel_layers import write_layers
