"""What the model card says of its checkpoint against what comes out: a table in the page.

The claims are rows of claims.toml. Their numbers are computed from the model's config and the
manifests, outcomes are those of records/verdicts.json, and patches those of dispositions.toml; so a
row cannot say what is not so any more.
"""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from vllm_forge.checkpoints.inspect.formats import Format
from vllm_forge.checkpoints.inspect.manifest import named
from vllm_forge.checkpoints.inspect.parts import DRAFT
from vllm_forge.checkpoints.inspect.remedies import COPES, read_remedies
from vllm_forge.checkpoints.inspect.verdicts import DATA, Verdicts
from vllm_forge.checkpoints.inventory import all_tensors, mtp_tensors
from vllm_forge.checkpoints.measured import PAGE
from vllm_forge.checkpoints.quantize.recipe import load_recipe
from vllm_forge.checkpoints.spans import DTYPE_BYTES
from vllm_forge.errors import UsageError
from vllm_forge.host import atomic_path
from vllm_forge.kernels.selection.artifacts import artifact_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vllm_forge.checkpoints.inspect.formats import Wanted

CLAIMS = Path(__file__).with_name("claims.toml")
BEGIN, END = "<!-- claims: made by `nox -s verdicts` -->", "<!-- claims end -->"
ORDER = ("contradicted", "half", "holds")
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
UPSTREAM = "vllm-project/vllm"


class Record(BaseModel):
    """Base of the records."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Sources(Record):
    """Names of the artifacts and recipes that the numbers are of."""

    model: str
    card: str
    sibling: str
    redhat: str
    modelopt: str
    recipe: str
    larger_recipe: str


class Claim(Record):
    """One row; see the head of claims.toml."""

    says: str
    found: str
    verdict: Literal["contradicted", "half", "holds"]


class Claims(Record):
    """claims.toml."""

    of: Sources
    claim: tuple[Claim, ...]


def read_claims() -> Claims:
    """All rows."""
    return Claims.model_validate(tomllib.loads(CLAIMS.read_text(encoding="utf-8")))


def claims_table(root: Path) -> str:
    """The rows with their numbers, contradicted ones first.

    Raises:
        UsageError: a row names a number, a variant or a patch that is not known.
    """
    claims = read_claims()
    known = {**_counts(claims.of), **_outcomes(root), **_patches(root)}
    rows = sorted(claims.claim, key=lambda row: ORDER.index(row.verdict))
    lines = ["| the card says | what is so | |", "|---|---|---|"]
    lines += [f"| {row.says} | {fill(row.found, known)} | {row.verdict} |" for row in rows]
    return "\n".join(lines)


def fill(text: str, known: Mapping[str, object]) -> str:
    """Put values in place of names in braces.

    Raises:
        UsageError: a name that is not known.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise UsageError(f"nothing is known as {match[1]!r}", where=str(CLAIMS))
        return str(known[match[1]])

    return PLACEHOLDER.sub(value, text)


def put_into(page: str, root: Path) -> str:
    """The page with its table made anew.

    Raises:
        UsageError: the page has no place for it.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"no {BEGIN} ... {END}", where=str(PAGE))
    return f"{head}{BEGIN}\n{claims_table(root)}\n{END}{tail}"


def write_claims(root: Path) -> None:
    """Make the table in the page anew."""
    path = root / PAGE
    text = put_into(path.read_text(encoding="utf-8"), root)
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _counts(of: Sources) -> dict[str, object]:
    """Numbers of the model and of the artifacts that the card's formats describe."""
    config: dict[str, Any] = artifact_config(of.model)
    tensors, drafts = list(all_tensors(config)), list(mtp_tensors(config))
    wide = [tensor.name for tensor in tensors if tensor.dtype == "F32"]
    card, sibling, redhat, modelopt = (
        list(named(name).wanted(config)) for name in (of.card, of.sibling, of.redhat, of.modelopt)
    )
    size, sibling_size, whole = _bytes(card), _bytes(sibling), _bytes(tensors)
    stated = [named(name).published.gigabytes or 0 for name in (of.card, of.sibling)]
    samples, more = (load_recipe(n).recipe.samples for n in (of.recipe, of.larger_recipe))
    return {
        "mtp": len(drafts),
        "mtp_native": _drafts(modelopt),
        "mtp_card": _drafts(card),
        "aliases": _drafts(card) - len(drafts),
        "mtp_f32": sum(tensor.dtype == "F32" for tensor in drafts),
        "f32": len(wide),
        "f32_hidden": sum(name.endswith((".ape", "gate.bias")) for name in wide),
        "i64": sum(tensor.dtype == "I64" for tensor in tensors),
        "card_gb": f"{size / 1e9:.1f}",
        "card_gib": f"{size / 2**30:.1f}",
        "w4a16_gb": f"{sibling_size / 1e9:.1f}",
        "redhat_gb": f"{_bytes(redhat) / 1e9:.1f}",
        "draft_gb": f"{_bytes(w for w in card if w.name.startswith(DRAFT)) / 1e9:.1f}",
        "larger": f"{100 * (size / sibling_size - 1):.0f}",
        "larger_stated": f"{100 * (stated[0] / stated[1] - 1):.0f}",
        "bf16_gb": f"{whole / 1e9:.0f}",
        "bf16_gib": f"{whole / 2**30:.0f}",
        "layers": config["num_hidden_layers"],
        "experts": config["n_routed_experts"],
        "top": config["num_experts_per_tok"],
        "hidden": config["hidden_size"],
        "packed": f"{sum(w.name.endswith('.weight_packed') for w in card):,}",
        "global_scales": f"{sum(w.name.endswith('_global_scale') for w in card):,}",
        "redhat_more": _quantized(of.redhat, config) - _quantized(of.card, config),
        "samples": samples,
        "more_samples": more,
        "fewer": more // samples,
    }


def _bytes(tensors: Iterable[Any]) -> int:
    """Of tensors of a model, or of an artifact."""
    return sum(
        math.prod(t.shape) * DTYPE_BYTES[t.dtypes[0] if hasattr(t, "dtypes") else t.dtype]
        for t in tensors
    )


def _drafts(wanted: Iterable[Wanted]) -> int:
    return sum(want.name.startswith(DRAFT) for want in wanted)


def _quantized(artifact: str, config: Mapping[str, Any]) -> int:
    manifest = named(artifact)
    found = (manifest.formats_of(tensor) for tensor in all_tensors(config))
    return sum(bool(formats) and formats[0] is not Format.PLAIN for formats in found)


def _outcomes(root: Path) -> dict[str, object]:
    """``variant:line`` -> what the line does with it."""
    text = (root / DATA).read_text(encoding="utf-8")
    return {
        f"{name}:{line}": row.outcome.value
        for name, variant in Verdicts.model_validate_json(text).variants.items()
        for line, row in variant.lines.items()
    }


def _patches(root: Path) -> dict[str, object]:
    """``#number`` -> what each line does about it."""
    found: dict[str, object] = {}
    for about, lines in read_remedies(root).rows.items():
        if about.startswith(f"{UPSTREAM}#"):
            said = (f"{line}: {COPES.get(status, status)}" for line, status in lines.items())
            found[about.removeprefix(UPSTREAM)] = ", ".join(said).replace("all: ", "")
    return found
