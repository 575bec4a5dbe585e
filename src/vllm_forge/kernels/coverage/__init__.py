"""Which device code an image holds, and whether that is what a cell needs."""

from vllm_forge.kernels.coverage.contents import Contents, Coverage
from vllm_forge.kernels.coverage.contract import Contract, Finding, Selected, contract
from vllm_forge.kernels.coverage.fatbin import Code, device_code
from vllm_forge.kernels.coverage.selected import selections_of
from vllm_forge.kernels.coverage.target import Capability, Kind, Target, parse_capability, runs_on

__all__ = [
    "Capability",
    "Code",
    "Contents",
    "Contract",
    "Coverage",
    "Finding",
    "Kind",
    "Selected",
    "Target",
    "contract",
    "device_code",
    "parse_capability",
    "runs_on",
    "selections_of",
]
