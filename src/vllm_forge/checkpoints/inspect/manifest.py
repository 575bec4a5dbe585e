"""What an artifact must hold: by the manifest of its kind, and by its own manifest.json.

One JSON file per kind in manifests/, as rules over the names that a config.json implies. Full lists
of names are published for none of them; each file says what its counts are known from, and a test
compares the rules with those counts. ``quantize`` writes a manifest.json beside a checkpoint:
every tensor, with its SHA-256. Comparing the digests needs all of the data, so it is optional.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import Field

from vllm_forge.checkpoints.architecture import main_tensors
from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.fixtures.sparse import MARK
from vllm_forge.checkpoints.inspect.checks_config import ARGUMENTS, is_of
from vllm_forge.checkpoints.inspect.findings import NUMBER, Finding, finding, scoped, summarize
from vllm_forge.checkpoints.inspect.profile import (
    LINEAR,
    Drafter,
    Format,
    Profile,
    RequiredTensor,
    alias_tensors,
    draft_tensors,
    stored_as,
)
from vllm_forge.checkpoints.tensors import TensorSpec
from vllm_forge.errors import UsageError
from vllm_forge.host import suggestion
from vllm_forge.matrix import Artifact, FrozenModel

FOLDER = Path(__file__).with_name("manifests")
# A checkpoint that differs in more kinds of names is another artifact, not a faulty one.
MOST_FOREIGN = 0.3
# One of each kind: hashed, sparse, heavily compressed or not. With the drafter they tell an
# artifact; the rest of 43 layers would only take time.
TELLING_LAYERS = 3
LAYER = re.compile(r"layers\.(\d+)\.")
RECORD = "manifest.json"
FACTS = ("quant_method", "format", "scale_fmt", "moe_quant_algo")


class Rule(FrozenModel):
    """Modules, by their names from the start, and the formats that their weights may have."""

    modules: str
    formats: tuple[Format, ...] = Field(min_length=1)


class Manifest(FrozenModel):
    about: str
    sources: tuple[str, ...] = Field(min_length=1)  # where its facts are from
    known: str  # what of it was seen, and what was concluded
    drafter: Drafter
    aliases: bool = False  # embedding and head are repeated below `mtp.0`
    rules: tuple[Rule, ...] = ()  # the first that means a module gives its formats; else plain
    # Facts of quantization_config, see `config_facts`.
    config: dict[str, Any] = Field(default_factory=dict)
    # Counts that others state, for a model of the real size.
    published: dict[str, int] = Field(default_factory=dict)

    def formats_of(self, tensor: TensorSpec) -> tuple[Format, ...]:
        """The formats that a tensor of the unquantized model may be stored in."""
        if not LINEAR.search(tensor.name):
            return ()
        module = tensor.name.removesuffix(".weight")
        matching = (rule.formats for rule in self.rules if re.fullmatch(rule.modules, module))
        return next(matching, (Format.PLAIN,))

    def wanted(
        self, config: Mapping[str, Any], formats: Mapping[str, Format] | None = None
    ) -> Iterator[RequiredTensor]:
        """Every tensor that an artifact with this config.json must hold.

        ``formats``: module -> how it is stored, to choose where a rule allows several.
        """
        tensors = [*main_tensors(config), *draft_tensors(config, self.drafter)]
        tensors += alias_tensors(config) if self.aliases else []
        for tensor in tensors:
            allowed = self.formats_of(tensor)
            if not allowed:
                yield RequiredTensor(**vars(tensor), dtypes=(tensor.dtype,))
                continue
            stored = (formats or {}).get(tensor.name.removesuffix(".weight"))
            kind = stored if stored in allowed else allowed[0]
            # A group that quantizes activations needs their calibrated scale.
            needed = self.config.get(f"{kind}.inputs") is not None
            for required in stored_as(tensor, kind):
                yield replace(required, optional=required.optional and not needed)


@cache
def manifests() -> Mapping[str, Manifest]:
    return {
        path.stem: Manifest.model_validate_json(path.read_text(encoding="utf-8"))
        for path in sorted(FOLDER.glob("*.json"))
    }


def named(name: str) -> Manifest:
    """One manifest; UsageError if it is unknown."""
    known = manifests()
    if name not in known:
        what = f"unknown manifest {name!r}{suggestion(name, known)}"
        remedy = "name one of those, or leave it out: the nearest one is taken"
        raise UsageError(what, where=FOLDER, remedy=remedy)
    return known[name]


def nearest(profile: Profile) -> str | None:
    """The artifact that a checkpoint is, or was meant to be; None when it is like none of them."""
    if not profile.tensors:
        return None
    config = {**profile.model, "num_hidden_layers": min(profile.layers, TELLING_LAYERS)}
    kinds = {
        NUMBER.sub("N", name)
        for name in profile.names
        if not (layer := LAYER.match(name)) or int(layer[1]) < TELLING_LAYERS
    }
    distances = {}
    for name, manifest in manifests().items():
        wanted = list(manifest.wanted(config, profile.formats))
        known = {NUMBER.sub("N", tensor.name) for tensor in wanted}
        needed = {NUMBER.sub("N", tensor.name) for tensor in wanted if not tensor.optional}
        distance = len(needed - kinds) + len(kinds - known)
        distances[name] = (distance, len(_differences(manifest, profile)), name)
    distance, _, best = min(distances.values())
    return best if distance <= MOST_FOREIGN * len(kinds) else None


def published_as(artifacts: Mapping[str, Artifact], place: str) -> str | None:
    """The artifact whose repository a place is, on the hub or in the hub's cache."""
    known = {artifact.repo.lower(): name for name, artifact in artifacts.items()}
    parts = [part.removeprefix("models--").replace("--", "/") for part in Path(place).parts]
    found = (known.get(part.lower()) for part in (place.partition("@")[0], *parts))
    return next((name for name in found if name in manifests()), None)


def departures(profile: Profile, name: str) -> Iterator[Finding]:
    """In what a checkpoint is not the artifact of that name."""
    manifest = named(name)
    absent, wrong, known = list[str](), list[str](), set[str]()
    for required in manifest.wanted(profile.model, profile.formats):
        known.add(required.name)
        tensor = profile.tensors.get(required.name)
        if tensor is None:
            if not required.optional:
                absent.append(required.name)
        elif tensor.dtype not in required.dtypes or tensor.shape != required.shape:
            wrong.append(
                f"{required.name} is {tensor.dtype} {list(tensor.shape)}, not "
                f"{required.dtype} {list(required.shape)}"
            )
    foreign = [name for name in profile.names if name not in known]
    for names, title in ((absent, "tensors are missing"), (foreign, "tensors are too many")):
        yield from scoped("manifest", names, title=f"{title}, by the manifest of {name}")
    if wrong:
        title = f"dtypes or shapes are not those of {name}"
        yield finding("manifest", f"{len(wrong)}, e.g. {wrong[0]}", title=title)
    if unlike := _differences(manifest, profile):
        title = f"quantization_config is not that of {name}"
        yield finding("manifest", "; ".join(unlike), title=title)


def config_facts(profile: Profile) -> dict[str, Any]:
    """What manifests say of a quantization_config, by the format that a group writes.

    ``<format>.inputs`` is ``input_activations.dynamic``, None for a group of weights alone;
    ``<format>.actorder`` is the order that GPTQ used. Where groups of one format differ, it is a
    list of what they say.
    """
    by_format: dict[str, list[Any]] = defaultdict(list)
    for group in profile.groups.values():
        for kind in filter(partial(is_of, group), ARGUMENTS):
            inputs = getattr(group.input_activations, "dynamic", None)
            for key, value in (("inputs", inputs), ("actorder", group.weights.actorder)):
                if value not in (values := by_format[f"{kind}.{key}"]):
                    values.append(value)
    facts = {key: profile.quantization.get(key) for key in FACTS}
    return facts | {key: v if len(v) > 1 else v[0] for key, v in by_format.items()}


def _differences(manifest: Manifest, profile: Profile) -> list[str]:
    facts = config_facts(profile)
    return [
        f"{key} is {facts.get(key)!r}, not {value!r}"
        for key, value in manifest.config.items()
        if facts.get(key) != value
    ]


def against_record(profile: Profile, *, digests: bool = False) -> Iterator[Finding]:
    """What changed since the tensors were written; with ``digests`` by their SHA-256 too."""
    if RECORD not in profile.source.sizes or not profile.tensors:
        if digests:
            what = f"--digests needs {RECORD}, which the checkpoint does not have"
            remedy = "leave it out, or compare with the model: --source PLACE --values 0"
            raise UsageError(what, where=profile.source, remedy=remedy)
        return
    try:
        record = profile.source.json(RECORD)
        rows: dict[str, Any] = record["tensors"]
        marks = (record.get(MARK), profile.config.get(MARK))
        recorded = {
            name: (row["dtype"], tuple(row["shape"]), row["file"], str(row["sha256"]))
            for name, row in rows.items()
        }
    except (CheckpointUnreadableError, KeyError, TypeError, AttributeError) as error:
        what = getattr(error, "what", f"{type(error).__name__}: {error}")
        yield finding("record", what, title=f"{RECORD} cannot be read")
        return
    if marks[0] != marks[1]:
        title = f"{RECORD} and config.json differ on whether it is a rehearsal"
        yield finding("record", f"{MARK} is not the same in both", title=title)
    stored = {n: (e.dtype, e.shape, e.shard) for n, e in profile.tensors.items()}
    both = sorted(recorded.keys() & stored.keys())
    changed = [name for name in both if recorded[name][:-1] != stored[name]]
    damaged = [n for n in both if digests and profile.tensors[n].sha256() != recorded[n][-1]]
    for names, title in (
        (sorted(recorded.keys() - stored.keys()), "recorded tensors are missing"),
        (sorted(stored.keys() - recorded.keys()), "tensors are not recorded"),
        (changed, "dtype, shape or shard is not as recorded"),
        (damaged, "bytes are not as recorded"),
    ):
        if names:
            yield finding("record", summarize(names), title=f"{title} in {RECORD}")
