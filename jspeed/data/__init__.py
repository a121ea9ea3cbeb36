"""What a run reads: packed token sequences, in the same order for any number of processes."""

from jspeed.data.build import build_dataset
from jspeed.data.dataset import TextDataset
from jspeed.data.packing import IGNORED_LABEL
from jspeed.data.pipeline import TrainIterator
from jspeed.data.tokenizer import ByteTokenizer, Tokenizer

__all__ = [
    "IGNORED_LABEL",
    "ByteTokenizer",
    "TextDataset",
    "Tokenizer",
    "TrainIterator",
    "build_dataset",
]
