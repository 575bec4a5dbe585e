"""What runs a server's container in the long run: a compose file, a systemd unit, a Deployment.

All are made of one `Service`, by the templates in forms/. None has a secret in it: a key is read
where the server starts.
"""

import json
import shlex
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vllm_forge.serve.command import Engine, Service, container_command, secret

FORMS = {"compose": "compose.yaml", "systemd": "systemd.service", "k8s": "k8s.yaml"}


def render(form: str, service: Service, engine: Engine) -> str:
    """One of FORMS. systemd starts the container again, so there the engine does not."""
    run = container_command(service.model_copy(update={"detach": False}), engine=engine)
    script = f"exec {shlex.join(run.argv)}"
    for name in service.secrets:  # a credential, systemd 247
        script = secret(name, f'"$CREDENTIALS_DIRECTORY/{name}"') + f" && {script}"
    template = Path(__file__).with_name("forms") / FORMS[form]
    unset = [variable for variable in service.env if "=" not in variable]
    return fill(template, s=service, engine=engine, script=script, unset=unset)


def fill(template: Path, **values: object) -> str:
    """A file of YAML or of systemd, filled; it writes each value as ``json`` or ``quote``."""
    templates = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - no HTML: each value goes through json or quote
        keep_trailing_newline=True,
    )
    templates.filters |= {"json": partial(json.dumps, ensure_ascii=False), "quote": shlex.quote}
    return templates.get_template(template.name).render(**values)
