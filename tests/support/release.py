"""The small project, ready to be released: policy, records, keys, receipts, and git."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tests.support.fast_build import FastEngine, FastRunner, lock_packages, tiny_deb
from tests.support.index_server import serve_folder
from tests.support.keys import key_pair, trust
from tests.support.receipts import FILE, SUITE, TESTS, list_cases, row
from vllm_forge.images.layout import MANIFEST, read_image
from vllm_forge.patches import read_series, read_tree_lock
from vllm_forge.project import Project
from vllm_forge.proofs.record import CHECKOUT, digest_of_tests
from vllm_forge.receipts import FOLDER
from vllm_forge.receipts.receipt import make_statement, write_receipt
from vllm_forge.receipts.suite import CASES, RUNNER, suite_hash
from vllm_forge.release.evidence import Trust
from vllm_forge.release.gate import Gate, Waiver, policy_of
from vllm_forge.release.pipeline import Job, plan_of
from vllm_forge.release.registry import Reference, Repository
from vllm_forge.signing import load_private, read_keyring

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.support.project import Project as MiniProject
    from vllm_forge.images.engines import Engine
    from vllm_forge.matrix.model import Stage

CELL = "vllm-0.1.0-alpha"
POLICY = """
[release.dev]

[release.candidate]
statements = ["provenance", "sbom"]
committed = true
proofs = true
max_age_days = 30

[release.release]
statements = ["provenance", "sbom"]
builders = 1
committed = true
proofs = true
upstream = true
tiers = ["server"]
max_age_days = 60
"""
ROLES = {"release": '["release", "builder", "vex"]', "lab": '["receipts"]', "second": '["builder"]'}


def git(folder: Path, *argv: str) -> str:
    """Run git; returns its stdout."""
    user = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    done = subprocess.run(
        ["git", "-C", str(folder), *user, *argv], check=True, capture_output=True, text=True
    )
    return done.stdout


def commit(root: Path) -> str:
    """Commit everything; returns the commit."""
    git(root, "add", "--all")
    git(root, "commit", "-qm", "all", "--allow-empty")
    return git(root, "rev-parse", "HEAD").strip()


def committed_checkout(folder: Path) -> Path:
    """A committed copy of what the gate of this project's own releases reads."""
    root = Path(__file__).parents[2]
    folders = ("docker", "patches", "records", "tests/gpu")
    for name in (*folders, "matrix.toml", "pyproject.toml", ".gitignore", *CHECKOUT):
        if (folder / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(root / name, folder / name, ignore=ignore)
        else:
            shutil.copy(root / name, folder / name)
    git(folder, "init", "-q")
    commit(folder)
    return folder


@contextmanager
def releasable(mini: MiniProject, folder: Path) -> Iterator[dict[str, Path]]:
    """A fast project, ready: its Debian package is at a snapshot; yields the private keys."""
    archive = folder / "archive"
    archive.mkdir()
    with serve_folder(archive) as snapshot:
        lock_packages(mini, tiny_deb(archive), snapshot)
        yield prepare(mini, folder)


def prepare(mini: MiniProject, folder: Path) -> dict[str, Path]:
    """Add to a project with a Debian lock what a release needs; returns the private keys."""
    root = mini.root
    matrix = root / "matrix.toml"
    matrix.write_text(matrix.read_text() + POLICY)
    for path, text in ((FILE, TESTS), (RUNNER, ""), ("tests/gpu/suite.toml", SUITE)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / CASES).parent.mkdir(exist_ok=True)
    list_cases(root)
    keys = {}
    for name, roles in ROLES.items():
        private, public = key_pair(folder / name, "ed25519" if name == "lab" else "p256")
        trust(root, public, name, roles=roles)
        keys[name] = private
    (root / ".gitignore").write_text("dist/\n__pycache__/\n")
    write_records(Project(root))
    git(root, "init", "-q")
    commit(root)
    return keys


def write_records(project: Project) -> None:
    """What ``patch prove`` and ``patch upstream`` would write of the one line."""
    line = project.matrix.line["mini"]
    tree = read_tree_lock(project.root / line.series, "mini")
    proofs = {
        "trees": {"base": tree.base, "result": tree.result},
        "environment": {"lock_sha256": project.lock("mini").digest},
        "tests": digest_of_tests(project.root),
        "patches": [
            {
                "name": patch.name,
                "proves": patch.proves,
                "with": {"passed": 1},
                "without": {"why": "KeyError"},
            }
            for patch in read_series(project.root / line.series)
        ],
    }
    upstream = {
        "trees": {"published": tree.base, "patched": tree.result},
        "files": {"tests/test_x.py": {"passed": 3}},
    }
    for kind, record in (("proofs", proofs), ("upstream", upstream)):
        path = project.records / kind / "mini.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))


def add_receipt(
    mini: MiniProject, digest: str, key: Path | None, finished: datetime | None = None
) -> Path:
    """Commit the receipt of a green run of tier server in alpha's image."""
    project = Project(mini.root)
    path = write_receipt(
        mini.root / FOLDER,
        make_statement(green_alpha(project, digest, finished)),
        None if key is None else load_private(key),
    )
    commit(mini.root)
    return path


def green_alpha(project: Project, digest: str, finished: datetime | None = None) -> dict[str, Any]:
    """The result of a green run of tier server in alpha's image."""
    end = (finished or datetime.now(UTC)).replace(microsecond=0)
    line, sku = project.matrix.line["mini"], project.matrix.sku["alpha"]
    margins = {"drafts": {"measured": 1.0, "bound": 16.0}}
    other = {"outcome": "other GPU", "why": "needs another GPU"}
    gpu = {
        "name": sku.device, "uuid_sha256": "0" * 64, "driver": "580.159.04",
        "compute_capability": sku.compute_capability, "memory_mib": 143771,
    }  # fmt: skip
    return {
        "schema": 1,
        "plan": {
            "sku": "alpha", "line": "mini", "lock_sha256": project.lock("mini").digest,
            "tree": read_tree_lock(project.root / line.series, "mini").result,
            "subject": {"name": CELL, "sha256": digest.removeprefix("sha256:")},
        },
        "tier": "server",
        "suite_sha256": suite_hash(project, "server", "alpha"),
        "started": (end - timedelta(minutes=5)).isoformat(),
        "finished": end.isoformat(),
        "exit": 0,
        "gpus": [gpu],
        "host": {"python": "3.13.0"},
        "configurations": {"plain": {"moe": []}},
        "tests": {
            f"{FILE}::test_one": row(margins=margins),
            f"{FILE}::test_two[1]": row(),
            f"{FILE}::test_two[2]": row(),
            f"{FILE}::test_elsewhere": row(**other),
            f"{FILE}::TestGroup::test_three": row(**other),
        },
    }  # fmt: skip


class ReleaseRunner(FastRunner):
    """A fast build, and a push by this project's own client in place of skopeo.

    ``stop``: raises KeyboardInterrupt where the first step that says this word would begin.
    """

    def __init__(self, stop: str = "") -> None:
        super().__init__()
        self.stop = stop

    def run(self, argv: Sequence[str], **options: Any) -> str:
        if argv[0] != "skopeo":
            return super().run(argv, **options)
        self.commands.append(list(argv))
        source, target = argv[-2:]
        image = read_image(Path(source.removeprefix("oci:")))
        repository = Repository(Reference.parse(target.removeprefix("docker://")))
        for blob in [image.manifest["config"], *image.manifest["layers"]]:
            repository.put_blob(image.blob(blob["digest"]))
        repository.put_manifest(image.blob(image.digest).read_bytes(), MANIFEST)
        return ""

    def act(self, what: str, action: Any) -> Any:
        if self.stop and self.stop in what:
            raise KeyboardInterrupt(what)
        return super().act(what, action)


@dataclass
class Releases:
    """Releases of alpha into one repository."""

    mini: MiniProject
    keys: dict[str, Path]
    reference: Reference
    engine: FastEngine = field(default_factory=FastEngine)

    def job(
        self, stage: Stage, key: str | None = "release", waivers: tuple[Waiver, ...] = (),
        **changes: Any,
    ) -> Job:  # fmt: skip
        """A release of alpha at a stage."""
        project = Project(self.mini.root)
        gate = Gate(
            project=project, cell=project.cell("alpha"), stage=stage, digest=None,
            policy=policy_of(project, stage), now=datetime.now(UTC), waivers=waivers,
        )  # fmt: skip
        settings: dict[str, Any] = {
            "reference": self.reference, "trust": Trust(keys=read_keyring(self.mini.root)),
            "plan": plan_of(gate, self.mini.root / "dist", cast("Engine", self.engine)),
            "key": None if key is None else load_private(self.keys[key]), **changes,
        }  # fmt: skip
        return Job(gate=gate, **settings)
