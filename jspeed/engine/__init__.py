"""`initialize` and the `Engine` it returns; the training loop of the command line."""

from jspeed.engine.engine import Engine, initialize

__all__ = ["Engine", "initialize"]
