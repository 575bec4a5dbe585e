"""CI made from matrix.toml as data: GitHub's workflows, and Buildkite's pipeline.

Values reach a shell in environment variables, never as text of its script. GPU suites run on
hosts of the project's own, which have the SKU as a label, and only on request.
"""

import re
from typing import Any

import yaml

from vllm_forge.errors import UsageError
from vllm_forge.project import Project

WORKFLOWS = ".github/workflows"
HEAD = "# Generated from matrix.toml by `nox -s docs`; do not edit.\n"
# The only action of others. Its pin is the workflow's own, which Dependabot proposes to change.
CHECKOUT = re.compile(r"actions/checkout@[0-9a-f]{40} # v\d+\.\d+\.\d+(?=\n)")
HOST = "ubuntu-24.04"
ISSUER = "https://token.actions.githubusercontent.com"
SUITE_MINUTES = 360
NOX = "python3 -m nox -s"
BUILD = f'{NOX} forge -- build "$SKU" --line "$LINE" --load'
SUITE = f'{NOX} test-gpu -- --sku "$SKU" --line "$LINE" --output'
INSTALL = {
    "name": "Install nox",
    "env": {"PIP_BREAK_SYSTEM_PACKAGES": "1"},
    "run": "python3 -m pip install --quiet nox",
}
LOGIN = 'docker login ghcr.io --username "$GITHUB_ACTOR" --password-stdin <<< "$TOKEN"'
RELEASE = f"""read -r sku line <<< "$CELL"
{NOX} release -- --sku "$sku" --line "$line" --stage "$STAGE" \\
"""
AS_WORKFLOW = f"""  --registry "ghcr.io/${{GITHUB_REPOSITORY,,}}" \\
  --identity "$GITHUB_SERVER_URL/$GITHUB_WORKFLOW_REF" --issuer {ISSUER} \\
  ${{WAIVE:+--waive "$WAIVE"}} ${{UNTIL:+--until "$UNTIL"}} ${{REASON:+--reason "$REASON"}}
"""
WAIVER = {
    "waive": "a tier to release without",
    "until": "last day of the waiver, e.g. 2027-01-31",
    "reason": "why, for who reads the release",
}
Data = dict[str, Any]


class _Dumper(yaml.SafeDumper):
    """Without anchors; scripts as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _dump(document: Data) -> str:
    return HEAD + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000)


def _cells(project: Project) -> list[str]:
    """SKU and line of each cell, as one word of each."""
    lines = project.matrix.line
    return [
        f"{sku} {name}" for sku in project.matrix.sku for name in lines if sku in lines[name].skus
    ]


def github_ci(project: Project) -> str:
    """The project's own check for every change; on request, the GPU suite of every cell."""
    rows = [dict(zip(("sku", "line"), cell.split(), strict=True)) for cell in _cells(project)]
    variables = {"SKU": "${{ matrix.sku }}", "LINE": "${{ matrix.line }}"}
    suite = f'{SUITE} "$HOME/gpu-results/$GITHUB_SHA/$SKU-$LINE"'
    check = {
        "name": "Lint, patches, tests",
        "runs-on": HOST,
        "timeout-minutes": 90,
        "permissions": {"contents": "read"},
        "steps": [{"name": "Check", "run": "sudo bash .ci/run"}],
    }
    gpu = {
        "name": "GPU suite, ${{ matrix.sku }}, line ${{ matrix.line }}",
        "if": "github.event_name == 'workflow_dispatch'",
        "needs": "check",
        "runs-on": ["self-hosted", "${{ matrix.sku }}"],
        "timeout-minutes": SUITE_MINUTES,
        "permissions": {"contents": "read"},
        "strategy": {"fail-fast": False, "matrix": {"include": rows}},
        "steps": [
            INSTALL,
            {"name": "Build", "env": variables, "run": BUILD},
            {"name": "Run the suite", "env": variables, "run": suite},
        ],
    }
    on = {"push": {"branches": ["main"]}, "pull_request": None, "workflow_dispatch": None}
    group = "ci-${{ github.ref }}-${{ github.event_name }}"
    busy = {"group": group, "cancel-in-progress": True}
    return _workflow(project, "ci", on, busy, {"check": check, "gpu": gpu})


def github_release(project: Project) -> str:
    """Release a cell from main, signed as this workflow: no key is stored."""
    choices = {"cell": _cells(project), "stage": list(project.matrix.release)}
    inputs: Data = {
        name: {"description": name, "type": "choice", "required": True, "options": options}
        for name, options in choices.items()
    }
    inputs |= {name: {"description": text, "type": "string"} for name, text in WAIVER.items()}
    variables = {name.upper(): f"${{{{ inputs.{name} }}}}" for name in inputs}
    job = {
        "name": "Build, sign, push, verify, name",
        "if": "github.ref == 'refs/heads/main'",
        "runs-on": HOST,
        "environment": "release",
        "timeout-minutes": 180,
        "permissions": {"contents": "read", "packages": "write", "id-token": "write"},
        "steps": [
            INSTALL,
            {"name": "Log in", "env": {"TOKEN": "${{ github.token }}"}, "run": LOGIN},
            {"name": "Release", "env": variables, "run": RELEASE + AS_WORKFLOW},
        ],
    }
    on, busy = {"workflow_dispatch": {"inputs": inputs}}, {"group": "release-${{ inputs.cell }}"}
    return _workflow(project, "release", on, busy, {"release": job})


def _workflow(project: Project, name: str, on: Data, concurrency: Data, jobs: Data) -> str:
    path = project.root / WORKFLOWS / f"{name}.yml"
    current = path.read_text(encoding="utf-8") if path.exists() else ""
    if len(pins := set(CHECKOUT.findall(current))) != 1:
        what = f"expected one pin actions/checkout@COMMIT # vX.Y.Z, found {len(pins)}"
        remedy = "restore the file with git checkout, or pin the action by its full commit"
        raise UsageError(what, where=str(path), remedy=remedy)
    pin = pins.pop()
    uses = pin.partition(" ")[0]
    first = {"uses": uses, "with": {"persist-credentials": False}}
    jobs = {key: job | {"steps": [first, *job["steps"]]} for key, job in jobs.items()}
    document = {
        "name": name, "on": on, "permissions": {}, "concurrency": concurrency, "jobs": jobs,
    }  # fmt: skip
    return _dump(document).replace(uses, pin)


def buildkite(project: Project) -> str:
    """The pipeline for ``buildkite-agent pipeline upload``, which makes ``$`` of ``$$``."""
    steps: list[Data] = [{"label": "check", "key": "check", "command": "bash .ci/run"}]
    for cell in _cells(project):
        sku, line = cell.split()
        commands = (BUILD, f"{SUITE} dist/gpu-results")
        steps.append(
            {
                "label": f"GPU suite, {sku}, line {line}",
                "depends_on": "check",
                "if": "build.source != 'webhook' && build.pull_request.id == null",
                "agents": {"queue": "gpu", "sku": sku},
                "env": {"SKU": sku, "LINE": line},
                "commands": [command.replace("$", "$$") for command in commands],
                "timeout_in_minutes": SUITE_MINUTES,
                "artifact_paths": ["dist/gpu-results/**/*", "records/receipts/**/*"],
            }
        )
    choices: dict[str, list[str]] = {"cell": _cells(project), "stage": list(project.matrix.release)}
    fields = [
        {"select": key, "key": key, "options": [{"label": row, "value": row} for row in rows]}
        for key, rows in choices.items()
    ]
    asked = [f"{key.upper()}=$(buildkite-agent meta-data get {key})\n" for key in choices]
    script = "".join(asked) + RELEASE + '  --registry "$FORGE_REGISTRY" --key "$FORGE_KEY"\n'
    main = {"if": "build.branch == 'main' && build.pull_request.id == null"}
    release = {"agents": {"queue": "release"}, "command": script.replace("$", "$$")}
    steps += [
        {"block": "release", "key": "choose", **main, "fields": fields},
        {"label": "release", "depends_on": "choose", **main, **release},
    ]
    return _dump({"steps": steps})
