"""Jobs are the same for every scheduler: image by digest, what it needs, what must come back."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import pytest

from tests.support.sessions import write_quality
from tests.support.site import make_site
from vllm_forge.commands import dispatch
from vllm_forge.commands.parsers import Parser
from vllm_forge.dispatch import jobs
from vllm_forge.dispatch.jobs import Volume, cell_image, job_specs, session_work, suite_works
from vllm_forge.errors import UsageError
from vllm_forge.gputest.launch import WITH_CACHES, container_command
from vllm_forge.project import Project

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.dispatch.jobs import JobSpec

DIGEST = "sha256:" + "d1" * 32


def specs(root: Path, folder: Path, *names: str, old: str = "", new: str = "") -> list[JobSpec]:
    project = Project(root)
    images = [
        cell_image(project, project.cell(sku, "0.26"), DIGEST) for sku in ("b300", "rtxpro6000")
    ]
    works = [suite_works(project)[name] for name in names]
    return list(job_specs(images, works, make_site(folder, project, old, new), "r1"))


def test_each_image_has_a_job_for_each_tier(root: Path, tmp_path: Path) -> None:
    made = specs(root, tmp_path, "kernel", "tp2")
    assert [spec.name for spec in made] == [
        "b300-0.26-kernel", "b300-0.26-tp2", "rtxpro6000-0.26-kernel", "rtxpro6000-0.26-tp2",
    ]  # fmt: skip
    first, second = made[:2]
    assert first.image == DIGEST
    assert first.reference == f"registry.lab:5000/forge/vllm@{DIGEST}"
    assert (first.gpus, second.gpus) == (1, 2)
    assert first.minutes == 8 + 20  # of the suite, and the site
    assert first.artifacts == ("kernel.json", "kernel.xml")
    assert first.command[-1] == "--tier=kernel"
    volume = Volume(source="/shared/forge/runs/r1/vllm-0.26.0-b300", target="/forge")
    assert first.volumes == (volume,)


def test_the_command_is_that_of_gpu_test(root: Path, tmp_path: Path) -> None:
    spec = specs(root, tmp_path, "kernel")[0]
    here = container_command("docker", "image", tmp_path, tmp_path, ["--tier=kernel"])
    assert [f"--entrypoint={spec.command[0]}", *here[here.index("image") + 1 :]] == [
        next(word for word in here if word.startswith("--entrypoint")), *spec.command[1:],
    ]  # fmt: skip
    assert {f"--env={name}={value}" for name, value in spec.environment.items()} <= set(here)


def test_caches_are_kept_at_the_place_of_the_stack(root: Path, tmp_path: Path) -> None:
    new = 'root = "/shared/forge"\ncaches = true'
    made = specs(root, tmp_path, "kernel", "server", old='root = "/shared/forge"', new=new)
    caches = [spec.volumes[1] for spec in made]
    assert len({row.source for row in caches}) == len(made), "two jobs write into one folder"
    assert not any(row.read_only for row in caches)
    assert made[0].command[2] == WITH_CACHES
    assert made[0].command[-1] == f"--caches={caches[0].target}"


def test_only_tiers_of_full_artifacts_get_weights(root: Path, tmp_path: Path) -> None:
    kernel, soak = specs(root, tmp_path, "kernel", "soak")[:2]
    place = "/forge/checkpoints/flash-nvfp4-fp8-mtp"
    assert [row.target for row in soak.volumes] == ["/forge", place]
    assert len(kernel.volumes) == 1


@pytest.mark.parametrize("word", ["slurm", "sbatch", "partition", "gres", "kubernetes", "pod"])
def test_jobs_have_no_words_of_a_scheduler(word: str) -> None:
    assert not any(word in name for name in jobs.JobSpec.model_fields)


def test_session_of_a_benchmark_has_a_node_of_its_own(root: Path, tmp_path: Path) -> None:
    """Its records must come back, it serves full artifacts, and its compilers' results are kept."""
    project = Project(root)
    work = session_work(root / "benchmarks/sessions/tiny-mtp.toml", 30)
    image = cell_image(project, project.cell("b300", "0.26"), DIGEST)
    (spec,) = job_specs([image], [work], make_site(tmp_path, project), "r1")
    assert (spec.exclusive, spec.session, spec.gpus, spec.minutes) == (True, True, 1, 50)
    assert {"tiny-mtp/mtp-c8.json", "tiny-mtp/mtp-c8.jsonl.gz"} < set(spec.artifacts)
    assert spec.command[-3:] == ("/forge/bench", "/output", "tiny-mtp")
    assert [row.target for row in spec.volumes] == [
        "/forge", image.cache, "/forge/checkpoints/flash-nvfp4-fp8-mtp",
    ]  # fmt: skip


def test_session_about_quality_brings_the_answers_of_each_start(tmp_path: Path) -> None:
    work = session_work(write_quality(tmp_path, 8000, {}, checkpoint="x"), 30)
    assert work.artifacts == tuple(f"december/mtp-c2.answers-{order}.jsonl" for order in (0, 1))
    assert (work.exclusive, work.weights) == (True, True)


def test_session_of_a_tiers_name_is_refused(root: Path, tmp_path: Path) -> None:
    """Their jobs would have one name, and the second would replace the first."""
    session = tmp_path / "session.toml"
    text = (root / "benchmarks/sessions/tiny-mtp.toml").read_text()
    session.write_text(text.replace('session = "tiny-mtp"', 'session = "kernel"'))
    args = argparse.Namespace(
        sessions=[str(session)], minutes=9, tiers=["kernel"], parser=Parser(prog="dispatch")
    )
    with pytest.raises(UsageError, match="duplicate name 'kernel' of sessions"):
        dispatch._works(Project(root), args)
