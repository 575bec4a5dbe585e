"""Compose file, unit and Deployment of a server, by the schemas and programs of those who read."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import check_jsonschema
import pytest
import yaml
from click.testing import CliRunner

from tests.support.kubernetes import schema_problems
from vllm_forge.cli import main
from vllm_forge.matrix import image_cell, load
from vllm_forge.serve.command import ServeOptions, Service, container_command, service_of
from vllm_forge.serve.deployment import find_deployment
from vllm_forge.serve.render import FORMS, render

ROOT = Path(__file__).parents[3]
MATRIX = load(ROOT)
ODD = "--served-model-name=50% of $HOME, $(id) \"and\" 'more' \\ x"


def service(*flags: str, env: tuple[str, ...] = (), **options: Any) -> Service:
    found = find_deployment(MATRIX, image_cell(MATRIX, "b300"), "mtp")
    return service_of(replace(found, flags=flags, env=env), ServeOptions(**options))


def test_compose_file_follows_the_schema_of_compose(tmp_path: Path) -> None:
    made = service(ODD, env=("HF_TOKEN", "A=b $c"), key=Path("/etc/key"), replica=2)
    made = made.model_copy(update={"volumes": (*made.volumes, "/my $models:/model:ro")})
    text = render("compose", made, "docker")
    document = yaml.safe_load(text)
    path = tmp_path / "compose.yaml"
    path.write_text(text)
    argv = ["--builtin-schema=vendor.compose-spec", str(path)]
    done = CliRunner().invoke(check_jsonschema.main, argv)
    assert done.exit_code == 0, done.output
    row = document["services"]["vllm"]
    assert [word.replace("$$", "$") for word in row["command"]] == list(made.command)
    (device,) = row["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == ["4", "5", "6", "7"]
    assert "count" not in device
    key = "VLLM_API_KEY=${VLLM_API_KEY:?see the second line of this file}"
    assert row["environment"] == ["HF_TOKEN", "A=b $$c", key]
    assert row["volumes"][-1] == "/my $$models:/model:ro"
    assert set(document["volumes"]) == {v.partition(":")[0] for v in row["volumes"][:-1]}
    assert 'VLLM_API_KEY="$(cat /etc/key)" docker compose up' in text


def test_compose_takes_any_gpus_by_number() -> None:
    document = yaml.safe_load(render("compose", service(), "docker"))
    row = document["services"]["vllm"]
    (device,) = row["deploy"]["resources"]["reservations"]["devices"]
    assert device["count"] == 4
    assert (row["ports"], row["ulimits"]["memlock"], row["init"]) == (["8000:8000"], -1, True)
    assert row["environment"] == []


def started(unit: str) -> list[str]:
    """The words that ExecStart's shell runs, as systemd unquotes them (systemd.syntax(7))."""
    (line,) = re.findall(r"^ExecStart=/bin/sh -c (.*)$", unit, re.M)
    script = json.loads(line.replace("%%", "%").replace("$$", "$"))
    return shlex.split(script)


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_unit_runs_the_printed_command(engine: Any) -> None:
    made = service(ODD)
    argv = started(render("systemd", made, engine))
    assert argv == ["exec", *container_command(made, engine=engine).argv]
    detached = render("systemd", made.model_copy(update={"detach": True}), engine)
    assert "--rm" in started(detached), "systemd starts it again, the engine must not"


def test_unit_reads_the_key_when_it_starts(tmp_path: Path) -> None:
    path = tmp_path / "100% key"
    path.write_text("s3cret")
    unit = render("systemd", service(key=path), "docker")
    assert "s3cret" not in unit
    assert f"LoadCredential=VLLM_API_KEY:{tmp_path}/100%% key" in unit
    argv = started(unit)
    assert argv[0] == "VLLM_API_KEY=$(cat $CREDENTIALS_DIRECTORY/VLLM_API_KEY)"
    assert argv[argv.index("exec") + 1] == "docker"
    assert "--env=VLLM_API_KEY" in argv


def test_unit_reads_variables_without_a_value_from_a_file() -> None:
    """systemd gives a unit none of the shell's, and docker leaves out what is not set."""
    unit = render("systemd", service(env=("HF_TOKEN", "A=b")), "docker")
    assert "\nEnvironmentFile=/etc/vllm-b300-mtp.env\n" in unit
    assert "each of HF_TOKEN;" in unit
    assert "EnvironmentFile" not in render("systemd", service(env=("A=b",)), "docker")


@pytest.mark.parametrize("content", ["s3cret\n", "", None])
@pytest.mark.parametrize("form", ["print", "systemd"])
def test_no_server_starts_without_its_key(form: str, content: str | None, tmp_path: Path) -> None:
    """With an empty one, vLLM would serve everybody."""
    path = tmp_path / "VLLM_API_KEY"
    if content is not None:
        path.write_text(content)
    engine = tmp_path / "docker"
    engine.write_text('#!/bin/sh\necho "started with $VLLM_API_KEY"\n')
    engine.chmod(0o755)
    made = service(key=path)
    script = container_command(made).text()
    if form == "systemd":
        (line,) = re.findall(r"^ExecStart=/bin/sh -c (.*)$", render(form, made, "docker"), re.M)
        script = json.loads(line.replace("%%", "%").replace("$$", "$"))
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == ("started with s3cret\n" if content else "")
    assert (done.returncode == 0) == bool(content)


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt-get install systemd"
)
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "vllm.service"
    made = service(ODD, env=("HF_TOKEN",), key=tmp_path / "key")
    unit.write_text(render("systemd", made, "docker"))
    argv = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "vllm.service" not in done.stderr, done.stderr


def test_deployment_of_kubernetes() -> None:
    """Its parts name each other."""
    made = service(ODD + "$$", env=("HF_TOKEN", "A=b $(PATH)"), key=Path("/etc/a key"))
    text = render("k8s", made, "docker")
    document = yaml.safe_load(text)
    assert schema_problems(document) == []
    template = document["spec"]["template"]
    assert document["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    (container,) = template["spec"]["containers"]
    assert [word.replace("$$", "$") for word in container["args"]] == list(made.command)
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}}
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}
    assert container["volumeMounts"][0]["mountPath"] == "/dev/shm"
    names = {row["name"]: row for row in container["env"]}
    assert names["A"]["value"] == "b $$(PATH)"  # Kubernetes replaces it, and halves dollars
    for name, key in (("HF_TOKEN", "HF_TOKEN"), ("VLLM_API_KEY", "key")):
        assert names[name]["valueFrom"]["secretKeyRef"]["key"] == key
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["timeoutSeconds"] == 5, "as the image's; 1 s is Kubernetes' default"
    assert "# nodeSelector: {nvidia.com/gpu.product: NVIDIA-B300-SXM6-AC}\n" in text
    port = container["startupProbe"]["httpGet"]["port"]
    assert port == container["ports"][0]["containerPort"] == 8000
    (command,) = re.findall("^# (key=.*)$", text, re.M)
    assert """key="$(cat '/etc/a key')" && printf %s "${key:?empty}" | kubectl create""" in command


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="needs kubectl: apt-get install kubernetes-client"
)
def test_kubectl_knows_every_field_of_the_deployment(tmp_path: Path) -> None:
    """It reads the file as its own type, and writes what it understood; nothing is lost."""
    path = tmp_path / "vllm.yaml"
    path.write_text(render("k8s", service(env=("HF_TOKEN",), key=Path("/etc/key")), "docker"))
    argv = [
        "kubectl",
        "set",
        "image",
        "--local",
        "--filename",
        str(path),
        "vllm=other",
        "-o",
        "json",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)

    def lost(ours: Any, theirs: Any, place: str = "") -> list[str]:
        if isinstance(ours, dict):
            theirs = theirs if isinstance(theirs, dict) else {}
            return [x for k in ours for x in lost(ours[k], theirs.get(k), f"{place}.{k}")]
        if isinstance(ours, list):
            pairs = zip(ours, theirs or [None] * len(ours), strict=True)
            return [x for a, b in pairs for x in lost(a, b, f"{place}[]")]
        return [] if str(ours) == str(theirs) or ours is False else [place]

    assert lost(yaml.safe_load(path.read_text()), json.loads(done.stdout)) == [
        ".spec.template.spec.containers[].image"
    ]


def test_model_folder_is_mounted_read_only(tmp_path: Path) -> None:
    found = find_deployment(MATRIX, image_cell(MATRIX, "b300"), "mtp")
    made = service_of(replace(found, model=tmp_path), ServeOptions())
    assert (
        f"{tmp_path}:/model:ro"
        in yaml.safe_load(render("compose", made, "docker"))["services"]["vllm"]["volumes"]
    )
    spec = yaml.safe_load(render("k8s", made, "docker"))["spec"]["template"]["spec"]
    (mount,) = (m for m in spec["containers"][0]["volumeMounts"] if m["mountPath"] == "/model")
    (volume,) = (volume for volume in spec["volumes"] if volume["name"] == mount["name"])
    assert (mount["readOnly"], volume["hostPath"]["path"]) == (True, str(tmp_path))


@pytest.mark.parametrize(
    "option",
    ["--gpu-ids=0,1,2,3", "--name=My_Server", "--name=a.", "--port=9000", "--replica=2"],
)
def test_option_that_kubernetes_cannot_take_is_refused(option: str) -> None:
    k8s = ["serve", "--sku=b300", "--preset=mtp", "--k8s", "--image=registry.example/vllm:1"]
    assert main([*k8s, option]) == 2
    assert main([*k8s, "--name=a.b-1"]) == 0


def test_kubernetes_needs_an_image_that_nodes_can_pull(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--sku=b300", "--preset=mtp", "--k8s"]) == 2
    assert "missing --image" in capsys.readouterr().err


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_printed_alone_on_stdout(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    image = "--image=registry.example/vllm:1"
    assert main(["serve", "--sku=b300", "--preset=mtp", f"--{form}", image]) == 0
    out = capsys.readouterr().out
    assert "canada-quant/DeepSeek-V4-Flash-NVFP4-FP8-MTP" in out
    if form != "systemd":
        assert isinstance(yaml.safe_load(out), dict)
