"""The installer: an environment that is not what it should be. Exit codes 70-79."""

from __future__ import annotations

from vllm_forge.errors.base import ForgeError


class InstalledVersionError(ForgeError):
    """The virtual environment holds another vLLM than the line's."""

    exit_code = 70


class DirtyTreeError(ForgeError):
    """Files of the installed vLLM are not the published ones."""

    exit_code = 71


class PartlyPatchedError(ForgeError):
    """Some of the files of the series are patched and some are not."""

    exit_code = 72


class NotPatchedError(ForgeError):
    """There is nothing to revert."""

    exit_code = 73


class AlreadyPatchedError(ForgeError):
    """The installed vLLM carries this series already."""

    exit_code = 74


class NoEnvironmentError(ForgeError):
    """No virtual environment to install into."""

    exit_code = 75
