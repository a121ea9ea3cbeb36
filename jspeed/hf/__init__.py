"""Models in Hugging Face's layout: read onto any sharding, and written back."""

from jspeed.hf.folder import Folder
from jspeed.hf.reading import load_parameter
from jspeed.hf.weights import Weights
from jspeed.hf.writing import copy_companions, write_model

__all__ = ["Folder", "Weights", "copy_companions", "load_parameter", "write_model"]
