"""Presets, their lint, and the host that serves. Exit codes 90-99."""

from __future__ import annotations

from vllm_forge.errors.base import ForgeError


class UnknownPresetError(ForgeError):
    """No preset of that name has a row for the SKU."""

    exit_code = 90


class UnknownArtifactError(ForgeError):
    """No such artifact, or the preset does not serve it."""

    exit_code = 91


class PresetLintError(ForgeError):
    """A preset asks a line's vLLM for something that it refuses, ignores or does badly."""

    exit_code = 92


class HostUnfitError(ForgeError):
    """This host cannot serve the preset; the red lines of the report say why."""

    exit_code = 93


class NoGpuError(ForgeError):
    """A server was asked for where there is no GPU, or no engine that gives it to a container."""

    exit_code = 94


class BuildRecordError(ForgeError):
    """The record of a build cannot be read."""

    exit_code = 95
