"""Commands, files, disk and locks of this host."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

FAULT = 33


class CommandFailedError(ForgeError):
    """A command that must succeed returned another code than 0."""

    exit_code = FAULT


class DiskSpaceError(ForgeError):
    """Not enough free disk for what is about to be written."""

    exit_code = FAULT


class BusyError(ForgeError):
    """Another process works on the same thing."""

    exit_code = FAULT


class CacheError(ForgeError):
    """A file of the cache is not what its name says."""

    exit_code = FAULT


class ToolMissingError(ForgeError):
    """A command that is needed is not on PATH."""

    exit_code = FAULT


class FileAccessError(ForgeError):
    """The system does not let a file or folder be read or written, or the disk is full."""

    exit_code = FAULT


class MountedError(ForgeError):
    """A folder is to be deleted, and a file system is mounted in it."""

    exit_code = FAULT
