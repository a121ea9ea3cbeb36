"""BERT."""

from jspeed.models.bert.config import BertConfig
from jspeed.models.bert.model import Bert

__all__ = ["Bert", "BertConfig"]
