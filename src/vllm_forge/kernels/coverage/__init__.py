"""Which device code an image holds, and whether it covers the needs of a cell."""

from vllm_forge.kernels.coverage.device_code import Code, device_code
from vllm_forge.kernels.coverage.target import Capability, Target, parse_capability, runs_on

__all__ = ["Capability", "Code", "Target", "device_code", "parse_capability", "runs_on"]
