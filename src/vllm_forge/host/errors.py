"""Commands, files, disk and locks of this host."""

from vllm_forge.errors import ForgeError

REFUSED = 30
UNDECIDED = 32
FAULT = 33


class CommandFailedError(ForgeError, exit_code=FAULT):
    """A command that must succeed returned another code than 0."""


class CommandLimitError(CommandFailedError, exit_code=UNDECIDED):
    """A command ran too long or printed too much, and was ended."""


class DiskSpaceError(ForgeError, exit_code=FAULT):
    """Not enough free disk for what is about to be written."""


class BusyError(ForgeError, exit_code=FAULT):
    """Another process works on the same thing."""


class CacheError(ForgeError, exit_code=FAULT):
    """A file of the cache is not what its name says."""


class ToolMissingError(ForgeError, exit_code=FAULT):
    """A command that is needed is not on PATH."""


class FileAccessError(ForgeError, exit_code=FAULT):
    """The system does not let a file or folder be read or written, or the disk is full."""


class RecordingError(ForgeError, exit_code=REFUSED):
    """A file that ``doctor --replay`` reads was not written by ``--save``."""


class MountedError(ForgeError, exit_code=FAULT):
    """A folder is to be deleted, and a file system is mounted in it."""
