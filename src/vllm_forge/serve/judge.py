"""Whether a deployment serves, with flags of its own: by recorded answers, else by asking vLLM.

The image's own vLLM answers, in a container without network, GPU and rights: no root is needed.
"""

import os
import shlex
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

from vllm_forge.checkpoints.architecture import Config
from vllm_forge.checkpoints.inspect.manifest import departures, manifests
from vllm_forge.checkpoints.inspect.profile import Profile
from vllm_forge.errors import UsageError
from vllm_forge.host import Runner, hash_of
from vllm_forge.host.errors import CommandFailedError, CommandLimitError, ToolMissingError
from vllm_forge.images.engines import Buildx, ContainerRun
from vllm_forge.kernels.selection import questions as asking
from vllm_forge.kernels.selection.questions import Answer, Question, artifact_config
from vllm_forge.kernels.selection.record import Rows
from vllm_forge.matrix import flags
from vllm_forge.serve.deployment import Deployment
from vllm_forge.serve.errors import HostUnfitError, ModelFolderError, NotJudgedError
from vllm_forge.serve.rules import LintCase, judge, require_clean

SECONDS = 60
# They change no kernel; their values are checked here.
COVERED = {flags.LENGTH, flags.UTILIZATION, flags.NAME}


def recorded(deployment: Deployment, rows: Rows) -> Answer | None:
    """The recorded answer, where it covers the flags: for a shorter context it does."""
    found = flags.values(deployment.flags)
    answer = deployment.recorded(rows)
    if answer is None and found.keys() <= COVERED:
        answer = replace(deployment, flags=()).recorded(rows)
        engine = None if answer is None else answer.engine
        length = flags.length(found, 1)
        if length is None or length > (engine.max_model_len if engine else 0):
            return None
    return answer


def ask(runner: Runner, deployment: Deployment, image: str, engine: str) -> Answer:
    """By vLLM in docker's or podman's image, for the declared SKU; or NotJudgedError.

    A volume of the questions' own keeps what Python compiled: two thirds of a first question.
    """
    sku, inherited = deployment.cell.sku, deployment.inherited
    own = {
        name: os.environ[name] if name in inherited else value
        for name, value in deployment.environment.items()
        if name not in inherited or name in os.environ
    }
    question = Question(
        name=asking.preset_question(deployment.preset_name, deployment.artifact_name),
        device=asking.declared_device(sku, count=asking.GPUS),
        artifact=deployment.artifact_name,
        arguments=tuple(deployment.arguments),
        environment={**sku.env, **own},
    )
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        asking.write_inputs(work / "inputs", [question])
        run = ContainerRun(
            layout=work, name=image, lower_dirs=(), inputs=work / "inputs", argv=asking.ARGV,
            seconds=SECONDS, work=work, bytecode=work,
            volume=f"vllm-forge-asked-{hash_of(image)[:12]}", client=engine,
        )  # fmt: skip
        try:
            output = Buildx().run_in_image(runner, run)
        except (CommandFailedError, CommandLimitError, ToolMissingError) as error:
            what = f"the image's vLLM did not answer, so nobody knows whether this serves:\n{error}"
            remedy = f"load the image into {engine}; or record the preset: docs/operate/serve.md"
            raise NotJudgedError(what, where=image, remedy=remedy) from None
    (answer,) = asking.read_answers(output, [question], image)
    return answer


def require_model(deployment: Deployment) -> None:
    """Raise ModelFolderError unless the local folder is the artifact, and the container sees it.

    By its manifest: sizes of the model, names, dtypes and shapes of all tensors, as inspect
    compares them.
    """
    name, folder = deployment.artifact_name, deployment.model
    odd = ":" in str(folder) or not str(folder).isprintable()
    if folder is None or odd or not folder.is_dir():
        what = f"invalid --model {folder}: expected a folder, without a colon or a control "
        what += "character in its path"
        raise UsageError(what, remedy="give one that exists, or rename it")
    _require_visible(folder)
    if name not in manifests():
        what = f"nothing says what {name} holds: it has no manifest"
        raise ModelFolderError(what, where=str(folder), remedy="name another --artifact")
    profile, wanted = Profile.open(folder), artifact_config(name)
    wrong = [
        f"{key} is {profile.model.get(key)}, not {wanted[key]}"
        for key in sorted(Config.model_fields.keys() & wanted.keys() - {"quantization_config"})
        if profile.model.get(key) != wanted[key]
    ]
    wrong = wrong or [f"{row.title}: {row.what}" for row in departures(profile, name)]
    if wrong:
        what = f"this is not {name}:\n  " + "\n  ".join(wrong)
        see = f"nox -s forge -- checkpoint inspect {shlex.quote(str(folder))}"
        remedy = f"name its --artifact; or see: {see}"
        raise ModelFolderError(what, where=str(folder), remedy=remedy)


def _require_visible(folder: Path) -> None:
    """Raise ModelFolderError for what the image's user, 10001 of group 0, cannot read.

    Files of the Hub's cache are links out of the folder, which alone is mounted.
    """
    for path in (folder, *sorted(folder.glob("[!.]*"))):
        if not path.resolve().is_relative_to(folder.resolve()):
            what = "a link out of the folder: the container does not see the file"
            remedy = "give a folder of plain files: hf download NAME --local-dir DIR"
            raise ModelFolderError(what, where=str(path), remedy=remedy)
        status = path.stat()
        bits = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(status.st_mode) else 0)
        if status.st_mode & bits != bits and (status.st_gid or status.st_mode >> 3 & bits != bits):
            what = "the image's user (10001, group 0) cannot read this"
            remedy = f"chmod -R go+rX {shlex.quote(str(folder))}"
            raise ModelFolderError(what, where=str(path), remedy=remedy)


def require_served(deployment: Deployment, rows: Rows, image: str | None, engine: str) -> str:
    """Raise PresetLintError or HostUnfitError if it does not start, or does badly.

    Returns why that is not known: ``image`` is None, so it was not asked, and no record covers it.
    """
    answer = recorded(deployment, rows)
    if answer is None and image is not None:
        answer = ask(Runner(), deployment, image, engine)
    memory = deployment.memory(rows, answer)
    if memory is not None and memory.verdict == "red":
        what = f"{deployment.preset_name} does not fit into its GPUs: {memory.needed}"
        raise HostUnfitError(what, where=memory.seen, remedy=memory.remedy)
    if answer is not None:
        _require_clean(deployment, answer)
        return ""
    given = " ".join([*deployment.flags, *deployment.own_environment])
    preset = f"preset {deployment.preset_name}"
    return f"no recorded answer of line {deployment.cell.line_name} covers {given or preset}"


def _require_clean(deployment: Deployment, answer: Answer) -> None:
    config = artifact_config(deployment.artifact_name)
    case = LintCase(**vars(deployment), answer=answer, published={}, config=config)
    remedy = "change the flags, or the row of matrix.toml, as each finding says"
    require_clean(judge(case), " ".join(deployment.arguments), remedy)
