"""The errors that jspeed raises on purpose.

Every message names what was wrong (a configuration key, a parameter path, a file), the value found,
what was expected and what to do. The command line prints the message alone; in Python the class
tells the kinds apart.
"""


class JspeedError(Exception):
    """Base of all errors that jspeed raises on purpose; its text is meant for the user."""


class ConfigError(JspeedError):
    """A run file or `ds_config.json` that cannot be used. The text starts with the quoted JSON
    path."""


class LayoutError(JspeedError):
    """A mesh, sharding rule or placement that cannot be realised."""


class ScheduleError(JspeedError):
    """A pipeline schedule's table that computes something else than it should."""


class ModelError(JspeedError):
    """A model or loss function that jspeed cannot train, or that broke a contract."""


class AnomalyError(JspeedError):
    """Losses or gradients went wrong in a way that the run was told to stop for."""


class DataError(JspeedError):
    """Training data that is missing, empty, damaged or does not fit the run."""


class CheckpointError(JspeedError):
    """A checkpoint that is missing, incomplete, damaged or foreign."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that was whole once and is not any more; another one may do."""


class OffloadError(JspeedError):
    """State beyond the device (in host memory or on disk) that cannot be kept, read or trusted."""


class OutOfMemoryError(JspeedError):
    """A device that cannot hold what a run needs; the text says who holds what, and what helps."""


class LaunchError(JspeedError):
    """Processes that cannot be started, wired together or kept running."""


class NotInJspeedError(JspeedError, AttributeError):
    """A DeepSpeed call without a counterpart; the text shows what to write instead."""


class MissingExtraError(JspeedError, ImportError):
    """An optional dependency is needed; the text names the extra to install."""
