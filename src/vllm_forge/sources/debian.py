"""The lock of the image's Debian packages: a row per .deb, made from the archive's signed lists."""

import hashlib
import io
import lzma
import re
import subprocess
import tarfile
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_forge.host import cache_root, exclusive, hash_of, open_plain, write_whole
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.matrix import Base
from vllm_forge.sources.errors import DistributionNotFoundError, LockFileError
from vllm_forge.sources.fetch import Download, download_all, verified
from vllm_forge.sources.index import PatientSession
from vllm_forge.sources.lock import read_rows

AGAIN = "nox -s lock -- --base"
ROW = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9+.-]+) (?P<version>[A-Za-z0-9.+:~-]+) (?P<architecture>[a-z0-9]+)"
    r" (?P<sha256>[0-9a-f]{64}) (?P<size>[1-9][0-9]*)"
    r" (?P<path>pool/(?:[A-Za-z0-9+_-][A-Za-z0-9+._~%-]*/)*[A-Za-z0-9+_-][A-Za-z0-9+._~%-]*\.deb)"
)
HEAD = re.compile(r"^# (?P<name>input|date): (?P<value>[0-9a-zA-Z]+)$", re.M)


@dataclass(frozen=True, kw_only=True)
class DebianPackage:
    """One .deb: size in bytes, SHA-256 in hex, ``path`` below the root of its archive."""

    name: str
    version: str
    architecture: str
    sha256: str
    size: int
    path: str

    @property
    def file(self) -> Path:
        return cache_root() / "debs" / self.sha256 / self.path.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class BaseLock:
    """All packages of the rootfs, sorted by name; ``digest`` is the SHA-256 of the file.

    ``date``: when the archives' lists were read, as snapshot services name a state.
    """

    path: Path
    date: str
    packages: tuple[DebianPackage, ...]
    digest: str


def input_digest(base: Base) -> str:
    """Hash of the fields of matrix.toml that the lock depends on."""
    return hash_of([base.suite, sorted(base.packages)])


def read_base_lock(root: Path, base: Base) -> BaseLock | None:
    """The lock that matrix.toml names, if any; LockFileError also if it is of other rows."""
    if base.lock is None:
        return None
    path, again = root / base.lock, f"run: {AGAIN}"
    text, rows = read_rows(path, ROW, again)
    head = {match["name"]: match["value"] for match in HEAD.finditer(text)}
    if head.get("input") != input_digest(base) or "date" not in head or not rows:
        what = "the lock was not made for what matrix.toml now says of [base]"
        raise LockFileError(what, where=path, remedy=again)
    return BaseLock(
        path=path,
        date=head["date"],
        packages=tuple(DebianPackage(**row) for row in rows),
        digest=hashlib.sha256(text.encode()).hexdigest(),
    )


def write_base_lock(path: Path, base: Base, date: str, packages: Sequence[DebianPackage]) -> None:
    """Write the lock; the order of ``packages`` does not matter."""
    rows = sorted(packages, key=lambda package: package.name)
    head = [
        f"# Debian {base.suite}, all packages of the rootfs. Made by:",
        f"#     {AGAIN}",
        "# Do not edit: name, version, architecture, SHA-256, bytes, path in the archive.",
        f"# input: {input_digest(base)}",
        f"# date: {date}",
    ]
    text = [f"{p.name} {p.version} {p.architecture} {p.sha256} {p.size} {p.path}" for p in rows]
    write_whole(path, "\n".join([*head, *text]) + "\n")


def paragraphs(text: str) -> Iterator[dict[str, str]]:
    """Fields of each paragraph of a Debian control file, first lines only."""
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        if fields := dict(line.split(": ", 1) for line in lines if re.match(r"[\w-]+: ", line)):
            yield fields


def installed_packages(status: str) -> dict[str, str]:
    """Package -> version, of dpkg's status file."""
    return {
        fields["Package"]: fields["Version"]
        for fields in paragraphs(status)
        if fields.get("Status", "").endswith(" installed")
    }


def parse_index(text: str, wanted: Set[tuple[str, str]]) -> list[DebianPackage]:
    """Rows of the lists for (name, version) that are installed, or DistributionNotFoundError."""
    known = {}
    for fields in paragraphs(text):
        key = (fields.get("Package", ""), fields.get("Version", ""))
        if key in wanted and {"Architecture", "SHA256", "Size", "Filename"} <= fields.keys():
            known[key] = DebianPackage(
                name=key[0],
                version=key[1],
                architecture=fields["Architecture"],
                sha256=fields["SHA256"],
                size=int(fields["Size"]),
                path=fields["Filename"],
            )
    if missing := wanted - known.keys():
        names = ", ".join(" ".join(key) for key in sorted(missing))
        what, remedy = f"the archive's lists have no {names}", f"try another mirror, then: {AGAIN}"
        raise DistributionNotFoundError(what, remedy=remedy)
    return list(known.values())


def fetch_debs(lock: BaseLock, archives: Sequence[str]) -> None:
    """Download what the cache lacks, each by hash from the first archive that has it."""
    downloads = [
        Download(
            url=urls[0],
            mirrors=tuple(urls[1:]),
            sha256=package.sha256,
            size=package.size,
            target=package.file,
        )
        for package in lock.packages
        if not package.file.exists() or package.file.stat().st_size != package.size
        for urls in [[f"{archive.rstrip('/')}/{package.path}" for archive in archives]]
    ]
    if not downloads:
        return
    with exclusive("debs", wait=True):
        try:
            download_all(PatientSession(), downloads)
        except DistributionNotFoundError as error:
            where = ", ".join(archives)
            remedy = f"lock the current packages, which changes the image's digest: {AGAIN}"
            raise DistributionNotFoundError(error.what, where=where, remedy=remedy) from error


def verified_debs(lock: BaseLock) -> list[Path]:
    """Files of the lock, whose bytes were hashed just now; see ``fetch.verified``."""
    return [verified(package.file, package.sha256) for package in lock.packages]


def control(deb: Path) -> str:
    """The control file of a package (deb(5)). dpkg-deb, which starts two programs, reads the rest.

    Raises CommandFailedError: it cannot be read.
    """
    with suppress(ValueError, EOFError, tarfile.TarError, lzma.LZMAError), open_plain(deb) as file:
        file.seek(8)  # the magic of ar(5), of which each member has a header of 60 bytes
        while header := file.read(60):
            size = int(header[48:58])
            if header.startswith(b"control.tar"):
                tar = tarfile.open(fileobj=io.BytesIO(file.read(size)))  # noqa: SIM115
                for content in (tar.extractfile(row) for row in tar if row.name == "./control"):
                    return content.read().decode() if content else ""
            file.seek(size + size % 2, 1)
    argv = ["dpkg-deb", "--field", str(deb)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        what = f"dpkg-deb exited with {done.returncode}: {done.stderr.strip()}"
        raise CommandFailedError(what, where=deb, remedy="see its output above")
    return done.stdout
