"""Starting the processes of a run, on this host or several, and again after a crash."""

from jspeed.launch.hosts import first, parse_hostfile, read_hostfile, select
from jspeed.launch.plan import local_gpus
from jspeed.launch.run import Launch, run_launch

__all__ = [
    "Launch",
    "first",
    "local_gpus",
    "parse_hostfile",
    "read_hostfile",
    "run_launch",
    "select",
]
