"""FlashInfer's kernel archives: folders of a server, each with a list of its files by SHA-256.

The locked wheel pins the hash of each list, so every byte is verified from the lock down.
"""

import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vllm_forge.host import cache_root, exclusive
from vllm_forge.sources import errors
from vllm_forge.sources.fetch import Download, Wheelhouse, download_all
from vllm_forge.sources.index import PatientSession
from vllm_forge.sources.lock import LockedWheel

LIST = "checksums.txt"
MIRROR = "FLASHINFER_CUBINS_REPOSITORY"  # FlashInfer's own variable
LARGEST = 64 << 20  # bytes of a file; the largest known has 9 MB
NAME = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
ROW = re.compile(rf"(?P<sha256>[0-9a-f]{{64}}) +(?P<path>(?:{NAME}/)*{NAME})")
# Of flashinfer/artifacts.py: the fields of ArtifactPath and CheckSumHash.
FIELD = r'^    (\w+): str = \(?\s*"(%s)/?"'
PATHS, PINS = (re.compile(FIELD % value, re.M) for value in (f"(?:{NAME}/)+{NAME}", "[0-9a-f]{64}"))
SERVER = re.compile(rf'"{MIRROR}",\s+"(https://[^"\s]+)"')  # of flashinfer/jit/cubin_loader.py


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A folder of the server, by FlashInfer's name for it, e.g. TRTLLM_GEN_BMM."""

    name: str
    path: str  # below the server, and in FlashInfer's folder
    sha256: str  # of its list, in hex; empty where FlashInfer does not pin one
    url: str
    folder: Path  # of the cache, for its files

    def fetch(self) -> dict[str, str]:
        """Download what the cache lacks; path -> SHA-256. WheelError for a list of unknown form."""
        hashes = {LIST: self.sha256}
        with exclusive("cubins", wait=True):
            self._download(hashes)
            for line in (self.folder / LIST).read_text().splitlines():
                if (row := ROW.fullmatch(line)) is None:
                    what = f"unsupported line in {LIST} of {self.name}: {line[:80]!r}"
                    raise errors.WheelError(what, remedy="support it in sources/cubins.py")
                hashes[row["path"]] = row["sha256"]
            self._download(hashes)
        return hashes

    def _download(self, hashes: dict[str, str]) -> None:
        downloads = [
            Download(
                url=f"{self.url}/{path}", sha256=sha256, size=LARGEST, exact=False,
                target=self.folder / path,
            )
            for path, sha256 in hashes.items()
        ]  # fmt: skip
        try:
            download_all(PatientSession(), downloads)
        except (errors.IndexUnreachableError, errors.DistributionNotFoundError) as error:
            error.remedy = f"name a mirror in {MIRROR}, or build without --kernels: FlashInfer "
            error.remedy += "then downloads them at the first start"
            raise


def read_archives(wheel: LockedWheel) -> list[Archive]:
    """The archives that a locked FlashInfer names, on its server or the mirror."""
    house = Wheelhouse()
    house.fetch([wheel])
    with zipfile.ZipFile(house.verify(wheel)) as archive:
        fields = archive.read("flashinfer/artifacts.py").decode()
        server = SERVER.findall(archive.read("flashinfer/jit/cubin_loader.py").decode())
    pins, url = dict(PINS.findall(fields)), os.environ.get(MIRROR) or "".join(server)
    return [
        Archive(
            name=name, path=path, sha256=pins.get(name, ""), url=f"{url.rstrip('/')}/{path}",
            folder=cache_root() / "cubins" / wheel.sha256 / path,
        )
        for name, path in PATHS.findall(fields)
    ]  # fmt: skip
