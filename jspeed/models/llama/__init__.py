"""Llama 2 and 3."""

from jspeed.models.llama.config import LlamaConfig
from jspeed.models.llama.model import Llama

__all__ = ["Llama", "LlamaConfig"]
