"""Work on a cluster; exit codes are those of the GPU suite, which most of it is."""

from vllm_forge.errors import ForgeError

REFUSED = 90
RED = 91
UNDECIDED = 92
FAULT = 93
SITE = "the site file"  # where a fault is, for those who do not know its path


class SiteFileError(ForgeError, exit_code=REFUSED):
    """The site file is missing, is not TOML, or a row of it cannot be used."""


class ClusterMismatchError(ForgeError, exit_code=REFUSED):
    """The cluster does not have what a row of the site file names, or not enough of it."""


class RunFolderError(ForgeError, exit_code=REFUSED):
    """A run is unknown here, or its image cannot be brought to the cluster."""


class JobsRedError(ForgeError, exit_code=RED):
    """A job of a run has a red verdict."""


class JobsUndecidedError(ForgeError, exit_code=UNDECIDED):
    """A job of a run has no verdict, or one that cannot be relied on."""


class SchedulerError(ForgeError, exit_code=FAULT):
    """The scheduler does not answer, or refused a job."""


class JobsFaultError(ForgeError, exit_code=FAULT):
    """A node could not run a job."""
