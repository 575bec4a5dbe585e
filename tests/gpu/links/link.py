"""How NCCL carries sums between the ranks of a host, and what logs say of that."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Strings of libnccl.so.2, NCCL 2.28.9 of line 0.26 and 2.30.7 of line 0.33:
# "Channel %02d : %d[%d] -> %d[%d] via SHM/%s/%s" and
# "Channel %02d/%01d : %d[%d] -> %d[%d] via P2P/%s%s%s"
CHANNEL = re.compile(r"Channel \d+(?:/\d+)? : \d+\[\d+\] -> \d+\[\d+\].* via (?P<transport>\w+)/")
# vLLM 0.26.0, distributed/device_communicators/cuda_communicator.py:265, by the first rank
BACKENDS = re.compile(r"Using \[(?P<names>[^]]*)\] all-reduce backends .* for group 'tp:\d+'")
LOGGED = {"NCCL_DEBUG": "INFO"}
NCCL_ALONE = "--disable-custom-all-reduce"  # vLLM's own needs peer access


@dataclass(frozen=True, kw_only=True)
class Link:
    """One way between GPUs; ``transport``: NCCL's name of it."""

    transport: str
    variables: dict[str, str] = field(default_factory=dict)


LINKS = {
    # From GPU to GPU: over NVLink where they have it.
    "peer": Link(transport="P2P", variables=LOGGED),
    # Through the host's memory, over PCIe: what is left without NVLink and peer access.
    "pcie": Link(transport="SHM", variables={**LOGGED, "NCCL_P2P_DISABLE": "1"}),
}


def transports(log: str) -> set[str]:
    """NCCL's names of what carries the channels between ranks."""
    return {found["transport"] for found in CHANNEL.finditer(log)}


def backends(log: str) -> list[str]:
    """What vLLM may add up the ranks' parts with, in its order."""
    found = BACKENDS.search(log)
    return re.findall(r"\w+", found["names"]) if found else []
