"""The host: commands, disk, cache, tools. Exit codes 30-39."""

from __future__ import annotations

from vllm_forge.errors.base import ForgeError


class CommandFailedError(ForgeError):
    """A command that must succeed returned another code than 0."""

    exit_code = 30


class DiskSpaceError(ForgeError):
    """Not enough free disk for what is about to be written."""

    exit_code = 31


class BusyError(ForgeError):
    """Another process works on the same thing."""

    exit_code = 32


class CacheError(ForgeError):
    """A file of the cache is not what its name says."""

    exit_code = 33


class ToolMissingError(ForgeError):
    """A command that is needed is not on PATH."""

    exit_code = 34


class FileAccessError(ForgeError):
    """The system does not let a file or folder be read or written, or the disk is full."""

    exit_code = 36


class MountedError(ForgeError):
    """A folder is to be deleted, and a file system is mounted in it."""

    exit_code = 35
