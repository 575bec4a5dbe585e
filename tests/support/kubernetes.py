"""What an API server would refuse of a Job: by its schema, and by rules that the schema lacks.

The schemas (kubernetes-validate) have types and names of fields. They have no enumerations and no
rule about two fields; those are in kubernetes/kubernetes: pkg/apis/batch/validation/validation.go.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import kubernetes_validate

from vllm_forge.host import Reply

if TYPE_CHECKING:
    from collections.abc import Sequence

VERSION = "1.37"
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
VALUE = re.compile(r"([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?", re.ASCII)
DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}")
MOST_CODES = 255
WORDS = {
    ("completionMode",): {"Indexed", "NonIndexed"},
    ("template", "spec", "restartPolicy"): {"Never", "OnFailure"},
}
ACTIONS = {"FailJob", "FailIndex", "Ignore", "Count"}


def schema_problems(document: dict[str, Any]) -> list[str]:
    """What the schema says of a manifest."""
    try:
        kubernetes_validate.validate(document, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"schema: {error.message}"]
    return []


def rule_problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with the manifest of an Indexed Job that its schema allows."""
    spec = document["spec"]
    found = [*_words(spec), *_numbers(document), *_policy(spec), *_pod(spec["template"]["spec"])]
    if "suspend" in spec:
        found.append("suspend: Kueue sets it itself")
    labels = document["metadata"].get("labels", {}).values()
    selector = spec["template"]["spec"].get("nodeSelector", {}).values()
    return found + [
        f"label: {text!r}" for text in (*labels, *selector) if not VALUE.fullmatch(text)
    ]


def _words(spec: dict[str, Any]) -> list[str]:
    found = []
    for path, words in WORDS.items():
        value: Any = spec
        for key in path:
            value = value.get(key, {})
        if value not in words:
            found.append(f"{'.'.join(path)}: {value!r} is not one of {sorted(words)}")
    return found


def _numbers(document: dict[str, Any]) -> list[str]:
    spec, found = document["spec"], []
    count = spec.get("completions", 0)
    if not 0 < spec.get("parallelism", 0) <= count:
        found.append("parallelism: more than completions, or 0")
    if not LABEL.fullmatch(f"{document['metadata']['name']}-{count - 1}"):
        found.append("name: with the index it is the pod's host name, a DNS label")
    if (failed := spec.get("maxFailedIndexes")) is not None and failed > count:
        found.append("maxFailedIndexes: more than completions")
    if "backoffLimitPerIndex" in spec and spec.get("completionMode") != "Indexed":
        found.append("backoffLimitPerIndex: only of Indexed jobs")
    # Ours: the words after `sh` are the jobs, by index.
    (container,) = spec["template"]["spec"]["containers"]
    words = container["command"]
    if len(words) - words.index("sh") - 1 != count:
        found.append("completions: not the number of the command's jobs")
    return found


def _policy(spec: dict[str, Any]) -> list[str]:
    found = []
    names = {container["name"] for container in spec["template"]["spec"]["containers"]}
    if spec["template"]["spec"].get("restartPolicy") != "Never":
        found.append("podFailurePolicy: needs restartPolicy Never")
    for number, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        where = f"podFailurePolicy.rules.{number}"
        if rule["action"] not in ACTIONS:
            found.append(f"{where}.action: {rule['action']!r}")
        if rule["action"] == "FailIndex" and "backoffLimitPerIndex" not in spec:
            found.append(f"{where}: FailIndex needs backoffLimitPerIndex")
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            found.append(f"{where}: exactly one of onExitCodes and onPodConditions")
        for condition in rule.get("onPodConditions", ()):
            if condition.get("status") not in {"True", "False", "Unknown"}:
                found.append(f"{where}: status {condition.get('status')!r}")
        if codes := rule.get("onExitCodes"):
            values = codes["values"]
            if codes["operator"] not in {"In", "NotIn"}:
                found.append(f"{where}.operator: {codes['operator']!r}")
            if values != sorted(set(values)) or 0 in values or len(values) > MOST_CODES:
                found.append(f"{where}.values: not ascending, has 0, or too many")
            if codes.get("containerName", next(iter(names))) not in names:
                found.append(f"{where}.containerName: {codes['containerName']!r}")
    return found


def _pod(pod: dict[str, Any]) -> list[str]:
    found = []
    volumes = [volume["name"] for volume in pod["volumes"]]
    if len(set(volumes)) != len(volumes):
        found.append("volumes: two of one name")
    for container in pod["containers"]:
        mounts = container["volumeMounts"]
        places = [mount["mountPath"] for mount in mounts]
        if len(set(places)) != len(places):
            found.append("volumeMounts: two at one path")
        found += [
            f"volumeMounts: no volume {mount['name']!r}"
            for mount in mounts
            if mount["name"] not in volumes
        ]
        if not DIGEST.fullmatch(container["image"]):
            found.append("image: not by digest")
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        if not isinstance(gpus, int) or gpus < 1:
            found.append(f"nvidia.com/gpu: {gpus!r}")
    return found


class Api:
    """What ``kubectl get jobs.batch,pods --output=json`` prints of a cluster that a test changes.

    Its shapes are those of the API (kubernetes/api, batch/v1 and core/v1).
    """

    def __init__(self, attempt: str) -> None:
        self.namespace, _, rest = attempt.partition("/")
        self.job, _, self.index = rest.rpartition("_")
        self.items: list[dict[str, Any]] = []
        self.code, self.text, self.asked = 0, "", list[list[str]]()

    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        assert name == "kubectl"
        self.asked.append(list(argv))
        document = {"apiVersion": "v1", "items": self.items, "kind": "List",
                    "metadata": {"resourceVersion": ""}}  # fmt: skip
        return Reply(code=self.code, text=self.text or json.dumps(document))

    def has_job(self, *conditions: dict[str, str], completions: int = 1, **status: Any) -> None:
        """The Job with a status; the pods stay."""
        self.items = [row for row in self.items if row["kind"] == "Pod"]
        self.items.append({
            "apiVersion": "batch/v1", "kind": "Job",
            "metadata": {"name": self.job, "namespace": self.namespace, "uid": "0b5c",
                         "creationTimestamp": "2026-11-30T12:40:12Z", "generation": 1},
            "spec": {"completionMode": "Indexed", "completions": completions,
                     "parallelism": completions, "backoffLimit": 2147483647,
                     "backoffLimitPerIndex": 1, "suspend": False},
            "status": {"conditions": list(conditions), "ready": 0, "terminating": 0,
                       "uncountedTerminatedPods": {}, **status},
        })  # fmt: skip

    def has_pod(self, phase: str, *, at: str = "12:40:13", **status: Any) -> None:
        self.items.append({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": f"{self.job}-{self.index}-x7k2p", "namespace": self.namespace,
                "creationTimestamp": f"2026-11-30T{at}Z",
                "annotations": {"batch.kubernetes.io/job-completion-index": self.index},
                "labels": {"batch.kubernetes.io/job-name": self.job, "job-name": self.job},
            },
            "spec": {"nodeName": "n1", "restartPolicy": "Never"},
            "status": {"phase": phase, "qosClass": "BestEffort", **status},
        })  # fmt: skip


def condition(kind: str, reason: str, message: str, *, status: str = "True") -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": message,
            "lastTransitionTime": "2026-11-30T12:41:00Z"}  # fmt: skip


def container(kind: str, **state: Any) -> list[dict[str, Any]]:
    """``containerStatuses`` of a pod."""
    return [{"name": "suite", "ready": False, "restartCount": 0, "state": {kind: state},
             "lastState": {}, "image": "registry.lab:5000/forge/vllm"}]  # fmt: skip
