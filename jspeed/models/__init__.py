"""The model families that a run file can name."""

from jspeed.models.bert import Bert, BertConfig
from jspeed.models.build import ModelFactory, build_model
from jspeed.models.gpt2 import GPT2, GPT2Config
from jspeed.models.hf import hf_document, model_from_document, model_from_hf
from jspeed.models.llama import Llama, LlamaConfig

__all__ = [
    "GPT2",
    "Bert",
    "BertConfig",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "ModelFactory",
    "build_model",
    "hf_document",
    "model_from_document",
    "model_from_hf",
]
