"""What runs a server's container in the long run: a compose file, a systemd unit, a Deployment.

All are made of one `Service`. None has a secret in it: a key is read where the server starts.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import yaml

from vllm_forge.serve.command import DOWNLOADS, MODEL, Engine, Service, container_command
from vllm_forge.serve.deployment import KEY

UID = 10001  # of docker/Dockerfile
SECRET = "vllm-api-key"  # noqa: S105 - the name of a Kubernetes Secret


def compose(service: Service, _: Engine) -> str:
    """A compose file; the API key comes from the environment of ``docker compose``."""
    device: dict[str, Any] = {"driver": "nvidia", "capabilities": ["gpu"]}
    if service.gpu_ids:
        device["device_ids"] = list(service.gpu_ids)
    else:
        device["count"] = service.gpus
    row = {
        "image": service.image,
        "container_name": service.name,
        # Compose replaces variables in all values: a dollar is written twice.
        "command": [word.replace("$", "$$") for word in service.command],
        "environment": [word.replace("$", "$$") for word in (*service.env, *service.secrets)],
        "ports": [f"{service.port}:{service.inner_port}"],
        "volumes": list(service.volumes),
        "shm_size": f"{service.shm_gb}g",
        "ulimits": {name: int(value) for name, value in _limits(service)},
        "init": True,
        "restart": "unless-stopped",
        "deploy": {"resources": {"reservations": {"devices": [device]}}},
    }
    named = [text.partition(":")[0] for text in service.volumes if not text.startswith("/")]
    volumes = {name: {"name": name} for name in named}
    start = "docker compose up --detach"
    for name, path in service.secrets.items():
        start = f'{name}="$(cat {shlex.quote(str(path))})" {start}'
    head = f"# {service.title}\n# {start}\n"
    return head + _yaml({"services": {"vllm": row}, "volumes": volumes})


def systemd(service: Service, engine: Engine) -> str:
    """A unit of the system's manager, for the foreground run of the container.

    systemd starts it again, so the engine does not; the key is a credential (systemd 247).
    """
    run = container_command(replace(service, detach=False), engine=engine)
    command, credentials = shlex.join(run.argv), ""
    for name, path in service.secrets.items():
        credentials += f"LoadCredential={name}:{path}\n"
        command = f'{name}="$(cat "$CREDENTIALS_DIRECTORY/{name}")" exec {command}'
    if not service.secrets:
        command = f"exec {command}"
    # A percent sign and a dollar are systemd's, a backslash and a quote are of its quoting.
    quoted = json.dumps(command, ensure_ascii=False).replace("%", "%%").replace("$", "$$")
    return f"""\
[Unit]
Description=vLLM: {service.title}
After=network-online.target {"docker.service" if engine == "docker" else ""}
Wants=network-online.target

[Service]
{credentials}ExecStartPre=-/usr/bin/env {engine} rm --force {service.name}
ExecStart=/bin/sh -c {quoted}
ExecStop=/usr/bin/env {engine} stop --time 60 {service.name}
Restart=always
RestartSec=10
TimeoutStopSec=90

[Install]
WantedBy=multi-user.target
"""


def kubernetes(service: Service, _: Engine) -> str:
    """A Deployment; weights and compiled code lie in claims, the key in a Secret.

    Health: one hour for download and compilation, as the image's own check allows less.
    """
    environment: list[dict[str, Any]] = []
    for variable in service.env:
        name, given, value = variable.partition("=")
        source = {"secretKeyRef": {"name": "vllm", "key": name, "optional": True}}
        environment.append({"name": name} | ({"value": value} if given else {"valueFrom": source}))
    if service.key is not None:
        reference = {"secretKeyRef": {"name": SECRET, "key": "key"}}
        environment.append({"name": KEY, "valueFrom": reference})
    probe = {"httpGet": {"path": "/health", "port": service.inner_port}, "periodSeconds": 30}
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
    size = f"{service.shm_gb}Gi"
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}
    ]
    for text in service.volumes:
        source_name, target = text.split(":")[:2]
        kind = {MODEL: "model", "/cache": "code"}.get(target, "downloads")
        mounts.append({"name": kind, "mountPath": target, "readOnly": kind == "model"})
        claim = {"persistentVolumeClaim": {"claimName": source_name.replace(".", "-")}}
        folder = {"hostPath": {"path": source_name, "type": "Directory"}}
        volumes.append({"name": kind} | (folder if kind == "model" else claim))
    container = {
        "name": "vllm",
        "image": service.image,
        "args": [word.replace("$(", "$$(") for word in service.command],
        "env": environment,
        "ports": [{"containerPort": service.inner_port}],
        "resources": {"limits": {"nvidia.com/gpu": service.gpus}},
        "startupProbe": {**probe, "failureThreshold": 120},
        "livenessProbe": probe,
        "readinessProbe": probe,
        "volumeMounts": mounts,
    }
    labels, name = {"app": service.name}, service.name
    document = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # two do not fit on the same GPUs
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    # fsGroup: claims of the root group, which the image's user is in.
                    "securityContext": {"runAsUser": UID, "runAsGroup": 0, "fsGroup": UID},
                    "enableServiceLinks": False,  # a Service called vllm would set VLLM_PORT
                    "containers": [container],
                    "volumes": volumes,
                },
            },
        },
    }
    head = f"# {service.title}\n# claims: {DOWNLOADS} holds weights, the other one compiled code\n"
    if service.key is not None:
        path = shlex.quote(str(service.key))
        head += f"# kubectl create secret generic {SECRET} --from-file=key={path}\n"
    return head + _yaml(document)


def _limits(service: Service) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (row.partition("=") for row in service.ulimits)]


class _Plain(yaml.SafeDumper):
    """Repeats a value instead of referring to it."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


def _yaml(document: object) -> str:
    return yaml.dump(document, Dumper=_Plain, sort_keys=False, width=1000)


FORMS: dict[str, Callable[[Service, Engine], str]] = {
    "compose": compose, "systemd": systemd, "k8s": kubernetes,
}  # fmt: skip
