"""Images: layers from wheels, a system from an engine, one checked OCI layout per cell."""

from vllm_forge.images.build import build_image as build_image
from vllm_forge.images.build import build_steps as build_steps
from vllm_forge.images.build import patched_wheel as patched_wheel
from vllm_forge.images.engines import choose_engine as choose_engine
from vllm_forge.images.engines import provision as provision
from vllm_forge.images.layout import Image as Image
from vllm_forge.images.layout import read_image as read_image
from vllm_forge.images.layout import verify as verify
from vllm_forge.images.plan import BuildOptions as BuildOptions
from vllm_forge.images.plan import ImagePlan as ImagePlan
from vllm_forge.images.plan import resolve as resolve
from vllm_forge.images.system import build_system as build_system
from vllm_forge.images.wheel_layers import write_layers as write_layers
