"""The GPUs of a host, as nvidia-smi lists them."""

from dataclasses import dataclass

NOT_APPLICABLE = {"N/A", "[N/A]", "[Not Supported]"}
# Names of nvidia-smi --help-query-gpu, in the order of Gpu. fabric.*: since driver 525.
FIELDS = (
    "index,name,compute_cap,driver_version,memory.total,mig.mode.current,fabric.state,fabric.status"
)
GPU_QUERY = ("nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Gpu:
    """A row of nvidia-smi, memory in bytes.

    ``fabric`` is the state of its NVLink fabric, None where it has none.
    """

    index: int
    name: str
    capability: str
    driver: str
    memory: int
    mig: bool
    fabric: str | None


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The rows that GPU_QUERY printed; ValueError if they are not such."""
    gpus = []
    for row in filter(str.strip, text.splitlines()):
        columns = map(str.strip, row.split(","))
        index, name, capability, driver, memory, mig, state, status = columns
        fabric = "ready" if (state, status) == ("Completed", "Success") else f"{state}, {status}"
        gpus.append(
            Gpu(
                index=int(index),
                name=name,
                capability=capability,
                driver=driver,
                memory=int(memory) << 20,
                mig=mig == "Enabled",
                fabric=None if state in NOT_APPLICABLE else fabric,
            )
        )
    return tuple(gpus)
