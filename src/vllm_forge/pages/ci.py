"""CI files of GitHub and Buildkite: ci.yml beside this file, filled in from matrix.toml."""

import re
from pathlib import Path
from typing import Any

import yaml

from vllm_forge.errors import UsageError
from vllm_forge.project import Project

WORKFLOWS = ".github/workflows"
HEAD = "# Generated from matrix.toml by `nox -s docs`; do not edit.\n"
# The only action of others. Its pin is the workflow's own, which Dependabot proposes to change.
CHECKOUT = re.compile(r"actions/checkout@[0-9a-f]{40} # v\d+\.\d+\.\d+(?=\n)")


class _Dumper(yaml.SafeDumper):
    """Without anchors; scripts as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = "|" if "\n" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _template(name: str) -> Any:
    return yaml.safe_load(Path(__file__).with_suffix(".yml").read_text(encoding="utf-8"))[name]


def _dump(document: Any) -> str:
    return HEAD + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000)


def _cells(project: Project) -> list[tuple[str, str]]:
    lines = project.matrix.line
    return [(sku, name) for sku in project.matrix.sku for name in lines if sku in lines[name].skus]


def github_ci(project: Project) -> str:
    document = _template("ci")
    rows = [{"sku": sku, "line": line} for sku, line in _cells(project)]
    document["jobs"]["gpu"]["strategy"]["matrix"]["include"] = rows
    return _workflow(project, document)


def github_release(project: Project) -> str:
    document = _template("release")
    inputs = document["on"]["workflow_dispatch"]["inputs"]
    inputs["cell"]["options"] = [" ".join(cell) for cell in _cells(project)]
    inputs["stage"]["options"] = list(project.matrix.release)
    return _workflow(project, document)


def _workflow(project: Project, document: Any) -> str:
    path = project.root / WORKFLOWS / f"{document['name']}.yml"
    pins = set(CHECKOUT.findall(path.read_text(encoding="utf-8") if path.exists() else ""))
    if len(pins) != 1:
        what = f"expected one pin actions/checkout@COMMIT # vX.Y.Z, found {len(pins)}"
        remedy = "restore the file with git checkout, or pin the action by its full commit"
        raise UsageError(what, where=path, remedy=remedy)
    pin = pins.pop()
    uses = pin.partition(" ")[0]
    for job in document["jobs"].values():
        job["steps"].insert(0, {"uses": uses, "with": {"persist-credentials": False}})
    return _dump(document).replace(uses, pin)


def buildkite(project: Project) -> str:
    """The pipeline for ``buildkite-agent pipeline upload``, which makes ``$`` of ``$$``."""
    check, suite = _template("buildkite")["steps"]
    steps = [
        {
            "label": f"GPU suite, {sku}, line {line}",
            "agents": {"queue": "gpu", "sku": sku},
            "env": {"SKU": sku, "LINE": line},
            **suite,
        }
        for sku, line in _cells(project)
    ]
    return _dump({"steps": [check, *steps]}).replace("$", "$$")
