"""The GPUs of a host, as nvidia-smi lists them."""

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 1 << 20
NOT_APPLICABLE = {"N/A", "[N/A]", "[Not Supported]"}
# Names of nvidia-smi --help-query-gpu that every driver of a supported CUDA knows.
BASIC = ("index", "name", "compute_cap", "driver_version", "memory.total")
# fabric.*: since driver 525.
DETAILED = (*BASIC, "mig.mode.current", "fabric.state", "fabric.status")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A row of nvidia-smi, memory in bytes. What was not asked has its default.

    ``fabric`` is the state of its NVLink fabric, None where it has none.
    """

    name: str
    capability: str
    driver: str
    memory: int
    index: int = 0
    uuid: str = ""
    mig: bool = False
    fabric: str | None = None


def gpu_query(fields: Sequence[str]) -> tuple[str, ...]:
    """The command that lists these fields of every GPU."""
    return ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")


def parse_gpus(text: str, fields: Sequence[str]) -> tuple[Gpu, ...]:
    """The rows that ``gpu_query(fields)`` printed; ValueError if they are not of these fields."""
    rows = [
        dict(zip(fields, map(str.strip, line.split(",")), strict=True))
        for line in filter(str.strip, text.splitlines())
    ]
    return tuple(
        Gpu(
            name=row["name"],
            capability=row["compute_cap"],
            driver=row["driver_version"],
            memory=int(row["memory.total"]) * MIB,
            index=int(row.get("index", 0)),
            uuid=row.get("uuid", ""),
            mig=row.get("mig.mode.current") == "Enabled",
            fabric=_fabric(row.get("fabric.state", "N/A"), row.get("fabric.status", "N/A")),
        )
        for row in rows
    )


def _fabric(state: str, status: str) -> str | None:
    if state in NOT_APPLICABLE:
        return None
    return "ready" if (state, status) == ("Completed", "Success") else f"{state}, {status}"
