"""Debian's docker-registry, skopeo and oras: images pushed, copied, and found by others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.conftest import require_registry
from tests.support.certificates import Certificates, make_certificates
from tests.support.docker_registry import DockerRegistry, docker_registry
from tests.support.registry_client import LOGIN, bundle_of, small_layout, store_login
from tests.support.registry_server import RegistryServer
from vllm_forge.host import Runner, which
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.images import Image, read_image, verify
from vllm_forge.release.errors import RegistryAuthError, RegistryUnreachableError
from vllm_forge.release.mirror import bundles_of, mirror, push_layout
from vllm_forge.release.referrers import attach, referrers
from vllm_forge.release.registry import Reference, Repository
from vllm_forge.signing.bundle import MEDIA_TYPE

pytestmark = pytest.mark.engine

PROVENANCE, SBOM = "https://slsa.dev/provenance/v1", "https://cyclonedx.org/bom"
ORAS = "no oras: put that of Debian forky's oras_1*.deb on PATH"


@pytest.fixture(autouse=True)
def logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of logins; requests go to this host."""
    require_registry()
    path = tmp_path / "auth.json"
    path.write_text("{}")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "cache"))
    return path


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path / "tls")


@pytest.fixture
def private(tmp_path: Path, certificates: Certificates, logins: Path) -> Iterator[DockerRegistry]:
    """With TLS by a private authority, and a login that is stored."""
    with docker_registry(tmp_path / "private", tls=certificates, login=True) as running:
        store_login(logins, running.host)
        yield running


@pytest.fixture
def public(tmp_path: Path) -> Iterator[DockerRegistry]:
    with docker_registry(tmp_path / "public") as running:
        yield running


@pytest.fixture
def layout(tmp_path: Path) -> Image:
    return small_layout(tmp_path / "dist" / "vllm")


def release(image: Image, reference: Reference, ca: Path | None = None) -> Repository:
    """Push, attach two bundles, name."""
    digest = f"sha256:{image.digest}"
    push_layout(Runner(), image.path, reference, digest, ca=ca)
    repository = Repository(reference, ca=ca)
    for kind in (PROVENANCE, SBOM):
        attach(repository, repository.manifest(digest), bundle_of(digest, kind), kind)
    repository.set_tag("1.0", digest)
    return repository


def contents(repository: Repository, digest: str) -> set[bytes]:
    return {row.bundle(repository) for row in referrers(repository, digest)}


def both_bundles(digest: str) -> set[bytes]:
    return {bundle_of(digest, kind) for kind in (PROVENANCE, SBOM)}


def test_image_is_pushed_and_read_with_tls_and_login(
    private: DockerRegistry, certificates: Certificates, layout: Image, tmp_path: Path
) -> None:
    runner = Runner()
    digest = f"sha256:{layout.digest}"
    reference = Reference.parse(f"{private.host}/forge/vllm")
    ca = certificates.authority
    push_layout(runner, layout.path, reference, digest, ca=ca)
    repository = Repository(reference, ca=ca)
    assert repository.tags() == ()
    manifest = repository.manifest(digest)
    repository.stream_blobs(manifest.blobs(), tmp_path)
    repository.set_tag("1.0", digest)
    assert repository.resolve("1.0") == digest
    assert repository.tags() == ("1.0",)
    assert LOGIN[1] not in str(runner.commands)


def test_other_login_or_authority_is_refused(
    private: DockerRegistry, certificates: Certificates, layout: Image, logins: Path, tmp_path: Path
) -> None:
    reference = Reference.parse(f"{private.host}/forge/vllm")
    digest, ca = f"sha256:{layout.digest}", certificates.authority
    other = make_certificates(tmp_path / "other").authority
    with pytest.raises(RegistryUnreachableError, match="certificate is not trusted"):
        Repository(reference, ca=other).resolve("1.0")
    with pytest.raises(CommandFailedError, match="certificate"):
        push_layout(Runner(), layout.path, reference, digest, ca=other)
    store_login(logins, private.host, ("robot", "wrong"))
    with pytest.raises(RegistryAuthError, match="answers 401"):
        Repository(reference, ca=ca).resolve("1.0")
    with pytest.raises(CommandFailedError, match=r"(?i)unauthorized|authentication"):
        push_layout(Runner(), layout.path, reference, digest, ca=ca)


def test_layout_with_another_digest_is_not_pushed(public: DockerRegistry, layout: Image) -> None:
    reference = Reference.parse(f"{public.host}/forge/vllm")
    with pytest.raises(CommandFailedError):
        push_layout(Runner(), layout.path, reference, f"sha256:{'0' * 64}")
    assert Repository(reference).tags() == ()


def test_bundles_are_attached_by_the_index(public: DockerRegistry, layout: Image) -> None:
    repository = release(layout, Reference.parse(f"{public.host}/forge/vllm"))
    digest = f"sha256:{layout.digest}"
    assert contents(repository, digest) == both_bundles(digest)
    index = json.loads(repository.manifest(digest.replace(":", "-")).content)
    assert [row["artifactType"] for row in index["manifests"]] == [MEDIA_TYPE] * 2
    before = repository.tags()
    release(layout, Reference.parse(f"{public.host}/forge/vllm"))
    assert repository.tags() == before


def test_processes_that_write_one_index_lose_nothing(public: DockerRegistry, layout: Image) -> None:
    reference = Reference.parse(f"{public.host}/forge/vllm")
    repository = release(layout, reference)
    digest = f"sha256:{layout.digest}"
    program = (
        "import sys\n"
        "from tests.support.registry_client import bundle_of\n"
        "from vllm_forge.release.referrers import attach\n"
        "from vllm_forge.release.registry import Reference, Repository\n"
        "repository = Repository(Reference.parse(sys.argv[1]))\n"
        "subject = repository.manifest(sys.argv[2])\n"
        "for number in range(5):\n"
        "    kind = f'https://example.com/{sys.argv[3]}/{number}'\n"
        "    attach(repository, subject, bundle_of(sys.argv[2], kind), kind)\n"
    )
    command = [sys.executable, "-c", program, str(reference), digest]
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}:{root / 'src'}"}
    processes = [subprocess.Popen([*command, str(number)], env=env) for number in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    index = json.loads(repository.manifest(digest.replace(":", "-")).content)
    assert len(index["manifests"]) == 2 + 4 * 5


def test_attached_bundles_outlive_garbage_collection(public: DockerRegistry, layout: Image) -> None:
    """docker-registry 2.8 deletes what no tag names, even what an index with a tag lists."""
    repository = release(layout, Reference.parse(f"{public.host}/forge/vllm"))
    public.collect_garbage()
    digest = f"sha256:{layout.digest}"
    assert contents(repository, digest) == both_bundles(digest)


def test_image_is_copied_to_another_registry(
    private: DockerRegistry, certificates: Certificates, layout: Image
) -> None:
    """Both with TLS; one has an index of what is attached, the other lists it itself."""
    ca = certificates.authority
    source = Reference.parse(f"{private.host}/forge/vllm:1.0")
    release(layout, source, ca)
    with RegistryServer(tls=certificates).running() as conforming:
        middle = Reference.parse(f"{conforming.host}/mirror/vllm:1.0")
        digest = mirror(source, middle, Runner(), ca=ca)
        assert contents(Repository(middle, ca=ca), digest) == both_bundles(digest)
        assert Repository(middle, ca=ca).resolve("1.0") == digest == f"sha256:{layout.digest}"
        target = Reference.parse(f"{private.host}/forge/again:1.0")
        assert mirror(middle, target, Runner(), ca=ca) == digest
        assert contents(Repository(target, ca=ca), digest) == both_bundles(digest)


def test_image_goes_through_a_folder_to_another_registry(
    private: DockerRegistry,
    public: DockerRegistry,
    certificates: Certificates,
    layout: Image,
    tmp_path: Path,
) -> None:
    """From one with TLS and login, to one without; the referrers keep their digests."""
    ca = certificates.authority
    source = Reference.parse(f"{private.host}/forge/vllm:1.0")
    repository = release(layout, source, ca)
    folder = tmp_path / "usb" / "vllm"
    digest = mirror(source, folder, Runner(), ca=ca)
    verify(read_image(folder))
    assert set(bundles_of(folder).values()) == both_bundles(digest)
    target = Reference.parse(f"{public.host}/forge/vllm:1.0")
    assert mirror(folder, target, Runner()) == digest
    assert Repository(target).resolve("1.0") == digest
    assert contents(Repository(target), digest) == both_bundles(digest)
    assert {row.manifest.digest for row in referrers(repository, digest)} == {
        row.manifest.digest for row in referrers(Repository(target), digest)
    }


@pytest.mark.parametrize("moment", [r".*/manifests/sha256-.*", ".*/manifests/1.0", ".*/blobs/.*"])
def test_killed_copy_names_nothing_and_goes_on(
    moment: str, public: DockerRegistry, layout: Image
) -> None:
    """Killed while the other registry gets a blob, an attached manifest, or the tag."""
    source = Reference.parse(f"{public.host}/forge/vllm:1.0")
    release(layout, source)
    digest = f"sha256:{layout.digest}"
    program = (
        "import sys\n"
        "from vllm_forge.host import Runner\n"
        "from vllm_forge.release.mirror import mirror\n"
        "from vllm_forge.release.registry import Reference\n"
        "mirror(*map(Reference.parse, sys.argv[1:]), Runner())\n"
    )
    running: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        os.kill(running[0].pid, signal.SIGKILL)
        running[0].wait()

    with RegistryServer(referrers_api=False).running() as registry:
        target = Reference.parse(f"{registry.host}/forge/vllm:1.0")
        registry.plant("PUT", moment, before=kill, status=500)
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
        command = [sys.executable, "-c", program, str(source), str(target)]
        with subprocess.Popen(command, env=env) as process:
            running.append(process)
        assert process.returncode == -signal.SIGKILL
        assert Repository(target).resolve("1.0") is None
        assert mirror(source, target, Runner()) == digest
        assert contents(Repository(target), digest) == both_bundles(digest)
        assert Repository(target).resolve("1.0") == digest


@pytest.mark.parametrize("api", [True, False], ids=["api", "index"])
def test_oras_discovers_the_bundles(
    api: bool, public: DockerRegistry, layout: Image, tmp_path: Path
) -> None:
    if which("oras") is None:
        pytest.skip(ORAS)
    with RegistryServer(referrers_api=api).running() as conforming:
        host = conforming.host if api else public.host
        release(layout, Reference.parse(f"{host}/forge/vllm"))
        command = ["oras", "discover", "--plain-http", "--format", "json", f"{host}/forge/vllm:1.0"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        document = json.loads(done.stdout)
        rows = document.get("referrers") or document["manifests"]
        assert [row["artifactType"] for row in rows] == [MEDIA_TYPE] * 2
        kinds = {row["annotations"]["dev.sigstore.bundle.predicateType"] for row in rows}
        assert kinds == {PROVENANCE, SBOM}
        pull = ["oras", "pull", "--plain-http", "--output", str(tmp_path / "pulled"),
                f"{host}/forge/vllm@{rows[0]['digest']}"]  # fmt: skip
        subprocess.run(pull, check=True, capture_output=True)
        (path,) = (tmp_path / "pulled").iterdir()
        assert path.read_bytes() in both_bundles(f"sha256:{layout.digest}")
        assert path.name.endswith(".sigstore.json")
