"""From matrix.toml to a Matrix, with the errors a person can act on."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_forge.host import suggestion
from vllm_forge.matrix.errors import MatrixFileError, MatrixValueError, UnknownKeyError
from vllm_forge.matrix.model import Matrix


def find_root() -> Path:
    """Folder that holds matrix.toml: ``VLLM_FORGE_ROOT``, the working directory or a parent."""
    start = Path(os.environ.get("VLLM_FORGE_ROOT") or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "matrix.toml").is_file():
            return folder
    raise MatrixFileError(
        "no matrix.toml here or above",
        where=str(start),
        remedy="run inside a checkout of vllm-forge, or set VLLM_FORGE_ROOT",
    )


def load(root: Path) -> Matrix:
    """Parse ``root/matrix.toml``.

    Raises:
        MatrixFileError: missing, or not TOML.
        UnknownKeyError: a key that no model has; with the nearest known one.
        MatrixValueError: any other fault, all of them in one message.
    """
    path = root / "matrix.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MatrixFileError("matrix.toml does not exist", where=str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MatrixFileError(
            f"not TOML in UTF-8: {error}", where=str(path), remedy="correct the line that it names"
        ) from None
    try:
        return Matrix.model_validate(data)
    except ValidationError as error:
        raise _explain(error, path) from None


def schema_text() -> str:
    """The JSON schema of matrix.toml, as committed in matrix.schema.json."""
    return json.dumps(Matrix.model_json_schema(), indent=2, sort_keys=True) + "\n"


def _explain(error: ValidationError, path: Path) -> UnknownKeyError | MatrixValueError:
    lines = []
    unknown = False
    for item in error.errors(include_url=False):
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            unknown = True
            known = _fields_at(list(item["loc"][:-1]))
            lines.append(f"unknown key {place}{suggestion(str(item['loc'][-1]), known)}")
        else:
            lines.append(f"{place}: {item['msg']}" if place else item["msg"])
    kind = UnknownKeyError if unknown else MatrixValueError
    return kind(
        "matrix.toml is refused:\n" + "\n".join(f"  - {line}" for line in lines),
        where=str(path),
        remedy="the allowed keys and their meaning are in matrix.schema.json",
    )


def _fields_at(loc: list[Any]) -> list[str]:
    current: Any = Matrix
    for part in loc:
        fields = getattr(current, "model_fields", None)
        if fields is None:  # dict[Name, Record] or tuple[Record, ...]
            arguments = getattr(current, "__args__", ())
            current = next((arg for arg in arguments if hasattr(arg, "model_fields")), None)
        elif part in fields:
            current = fields[part].annotation
        else:
            return []
    return list(getattr(current, "model_fields", ()))
