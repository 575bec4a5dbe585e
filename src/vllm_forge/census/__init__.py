"""Which device code an image holds, and whether that is what a cell needs."""

from vllm_forge.census.contents import Contents, Coverage
from vllm_forge.census.contract import Contract, Finding, Selected, contract
from vllm_forge.census.fatbin import Code, device_code
from vllm_forge.census.selected import selections_of
from vllm_forge.census.target import Capability, Kind, Target, parse_capability, runs_on

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
