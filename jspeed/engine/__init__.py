"""`initialize` and the `Engine` it returns; the training loop of the command line."""

from jspeed.engine.distributed import init_distributed
from jspeed.engine.engine import Engine, initialize

__all__ = ["Engine", "init_distributed", "initialize"]
