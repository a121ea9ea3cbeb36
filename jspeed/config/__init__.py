"""Configuration: a DeepSpeed JSON file, or jspeed's run file, as one typed and frozen object."""

from jspeed.config.auto import AutoFacts
from jspeed.config.batch import Batch, resolve_batch
from jspeed.config.config import Config
from jspeed.config.dump import KeyReport
from jspeed.config.elasticity import ElasticPlan, compute_elastic_config
from jspeed.config.key import Auto, Key, Treatment
from jspeed.config.keys import KEYS
from jspeed.config.load import load_config, resolve_optimizer, resolve_scheduler
from jspeed.config.remat import Budget, Checkpoint, LayerRange, Remat, RematPolicy, TensorName
from jspeed.config.sections import (
    ActivationCheckpointingConfig,
    AttentionConfig,
    BatchConfig,
    DataConfig,
    ElasticityConfig,
    LayerSpec,
    LossScaleConfig,
    MeshConfig,
    ModelConfig,
    OffloadOptimizerConfig,
    OffloadParamConfig,
    OptimizerConfig,
    PrecisionConfig,
    RopeScalingConfig,
    SchedulerConfig,
    SparseAttentionConfig,
    TensorParallelConfig,
    TokenizerConfig,
    ZeroConfig,
)
from jspeed.config.sections_run import (
    CheckpointConfig,
    ClusterConfig,
    CommsLoggerConfig,
    FlopsProfilerConfig,
    MonitorConfig,
    RunConfig,
    SweepConfig,
    WatchdogConfig,
)

__all__ = [
    "KEYS",
    "ActivationCheckpointingConfig",
    "AttentionConfig",
    "Auto",
    "AutoFacts",
    "Batch",
    "BatchConfig",
    "Budget",
    "Checkpoint",
    "CheckpointConfig",
    "ClusterConfig",
    "CommsLoggerConfig",
    "Config",
    "DataConfig",
    "ElasticPlan",
    "ElasticityConfig",
    "FlopsProfilerConfig",
    "Key",
    "KeyReport",
    "LayerRange",
    "LayerSpec",
    "LossScaleConfig",
    "MeshConfig",
    "ModelConfig",
    "MonitorConfig",
    "OffloadOptimizerConfig",
    "OffloadParamConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "Remat",
    "RematPolicy",
    "RopeScalingConfig",
    "RunConfig",
    "SchedulerConfig",
    "SparseAttentionConfig",
    "SweepConfig",
    "TensorName",
    "TensorParallelConfig",
    "TokenizerConfig",
    "Treatment",
    "WatchdogConfig",
    "ZeroConfig",
    "compute_elastic_config",
    "load_config",
    "resolve_batch",
    "resolve_optimizer",
    "resolve_scheduler",
]
