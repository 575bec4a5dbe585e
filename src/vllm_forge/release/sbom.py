"""Read SBOMs of images and compare them; ``components`` makes them."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_forge.images.layer import LayerBlob
from vllm_forge.images.record import differences
from vllm_forge.release.contents import EMBEDDED, VENDORED, image_contents
from vllm_forge.release.errors import SbomError

Document = dict[str, Any]
Tables = tuple[dict[str, str], ...]


def packages_of(document: Document) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> version of the image's own Python and Debian packages, without nested components.

    SbomError: not an SBOM as ``make_sbom`` writes it.
    """
    python: dict[str, str] = {}
    debian: dict[str, str] = {}
    tables = {"pkg:pypi/": python, "pkg:deb/debian/": debian}
    try:
        if (document["bomFormat"], document["specVersion"]) != ("CycloneDX", "1.6"):
            raise ValueError("it is not CycloneDX 1.6")  # noqa: TRY301
        for row in document["components"]:
            name, version, purl = str(row["name"]), row.get("version"), str(row.get("purl", ""))
            table = next((t for start, t in tables.items() if purl.startswith(start)), None)
            if table is None:
                continue
            if name in table:
                raise ValueError(f"{name} is listed twice")  # noqa: TRY301
            table[name] = str(version)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        remedy = "get the SBOM that was made with the image"
        raise SbomError(f"invalid SBOM: {error!r}", remedy=remedy) from None
    return python, debian


def diff(old: Document, new: Document) -> list[str]:
    """What was added, removed or changed, a sentence each: packages, their parts, patches."""
    return _compare(_tables(old), _tables(new))


def compare_contents(document: Document, layers: Sequence[LayerBlob]) -> list[str]:
    """Differences between an SBOM and the bytes of an image, none if it is right.

    Unpacks all layers, lowest first, which takes about a minute for a full image.
    """
    python, debian = packages_of(document)
    vendored: dict[str, str] = {}
    sboms: dict[str, str] = {}
    for row, nested in components_of(document):
        for item in row.get("properties", ()):
            if item["name"] == VENDORED:
                vendored[item["value"]] = f"{row['name']} {row['version']}"
            elif item["name"] == EMBEDDED and not nested:
                path, _, digest = item["value"].rpartition(" ")
                sboms[path] = digest
    return _compare((python, debian, vendored, sboms), image_contents(layers))


def _compare(old: Tables, new: Tables) -> list[str]:
    pairs = zip(old, new, strict=True)
    return [row for a, b in pairs if a != b for row in differences(a, b)]


def _tables(document: Document) -> Tables:
    """Own packages, parts of packages, and patches: name -> version and hash."""
    packages_of(document)
    own: dict[str, str] = {}
    parts: dict[str, set[str]] = {}
    patches = {}
    for row, inside in components_of(document):
        digest = next((item["content"] for item in row.get("hashes", ())), "")
        if inside:
            parts.setdefault(f"{row['name']} in {inside}", set()).add(str(row.get("version", "")))
        elif row.get("purl"):
            own[row["name"]] = f"{row['version']} {digest}".strip()
        for patch in row.get("pedigree", {}).get("patches", ()):
            content = base64.b64decode(patch["diff"]["text"]["content"])
            patches[f"patch {patch['diff']['url']}"] = hashlib.sha256(content).hexdigest()
    return own, {name: " ".join(sorted(versions)) for name, versions in parts.items()}, patches


def components_of(document: Document) -> Iterator[tuple[Document, str]]:
    """Each component with the name of the one that it is nested in, empty for own ones."""
    for row in document["components"]:
        yield row, ""
        for nested in row.get("components", ()):
            yield nested, row["name"]
