"""Can this host serve a preset? Asked without changing anything."""

from vllm_forge.serve.doctor.finding import Finding, Wanted
from vllm_forge.serve.doctor.gpus import (
    check_driver,
    check_fabric,
    check_gpus,
    check_memory,
    check_mixed_drivers,
    check_split,
)
from vllm_forge.serve.doctor.host import Host, ask_host
from vllm_forge.serve.doctor.machine import check_disk, check_engine, check_ram, check_shm

CHECKS = (
    check_gpus,
    check_split,
    check_memory,
    check_driver,
    check_mixed_drivers,
    check_fabric,
    check_engine,
    check_disk,
    check_ram,
    check_shm,
)

__all__ = ["CHECKS", "Finding", "Host", "Wanted", "ask_host", "judge"]


def judge(host: Host, wanted: Wanted) -> list[Finding]:
    """Every check's findings, in order."""
    return [finding for check in CHECKS for finding in check(host, wanted)]
