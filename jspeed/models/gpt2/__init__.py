"""GPT-2."""

from jspeed.models.gpt2.config import GPT2Config
from jspeed.models.gpt2.model import GPT2

__all__ = ["GPT2", "GPT2Config"]
