"""jspeed: DeepSpeed's promises kept natively in JAX.

engine = jspeed.initialize(model=model, loss_fn=loss_fn, config="ds_config.json")
for batch in loader:
    metrics = engine.train_batch(batch)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "LayerSpec",
    "LossSum",
    "PipelineModule",
    "TiedLayerSpec",
    "__version__",
    "compute_elastic_config",
    "get_model_profile",
    "init_distributed",
    "initialize",
    "load_config",
]

if TYPE_CHECKING:
    from jspeed.config import compute_elastic_config, load_config
    from jspeed.core.loss import LossSum
    from jspeed.engine import Engine, init_distributed, initialize
    from jspeed.engine.model_profile import get_model_profile
    from jspeed.pipeline.module import LayerSpec, PipelineModule, TiedLayerSpec

_HOMES = {
    "Engine": "jspeed.engine",
    "get_model_profile": "jspeed.engine.model_profile",
    "init_distributed": "jspeed.engine",
    "initialize": "jspeed.engine",
    "LayerSpec": "jspeed.pipeline.module",
    "PipelineModule": "jspeed.pipeline.module",
    "TiedLayerSpec": "jspeed.pipeline.module",
    "LossSum": "jspeed.core.loss",
    "compute_elastic_config": "jspeed.config",
    "load_config": "jspeed.config",
}


def __getattr__(name: str) -> Any:
    # Loaded on demand, so that reading a configuration does not import JAX.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jspeed' has no attribute {name!r}")
