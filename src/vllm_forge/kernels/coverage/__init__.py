"""Which device code an image holds, and whether it covers the needs of a cell."""

from vllm_forge.kernels.coverage.device_code import Code as Code
from vllm_forge.kernels.coverage.device_code import device_code as device_code
from vllm_forge.kernels.coverage.target import Capability as Capability
from vllm_forge.kernels.coverage.target import Target as Target
from vllm_forge.kernels.coverage.target import parse_capability as parse_capability
from vllm_forge.kernels.coverage.target import runs_on as runs_on
