"""Configuration. Validates everything that can be known before a process starts."""

from pointillist.config.assets import AssetServerConfig
from pointillist.config.base import Config
from pointillist.config.inference import InferenceConfig
from pointillist.config.launch import SlurmConfig, SupervisionConfig
from pointillist.config.monitors import MonitorsConfig, WandbConfig
from pointillist.config.orchestrator import (
    EnvConfig,
    EnvWorkerConfig,
    GatewayConfig,
    GatewayServerConfig,
    OrchestratorConfig,
    PolicyConfig,
    RolloutsConfig,
    SamplingConfig,
    WorkersConfig,
)
from pointillist.config.rl import RLConfig
from pointillist.config.shared import (
    CARRIER,
    LIMITS_CARRIER,
    RUN_KEY,
    AssetsConfig,
    LimitsConfig,
    ModelConfig,
    MultimodalConfig,
    TransportConfig,
)
from pointillist.config.trainer import TrainerConfig

__all__ = [
    "CARRIER",
    "LIMITS_CARRIER",
    "RUN_KEY",
    "AssetServerConfig",
    "AssetsConfig",
    "Config",
    "EnvConfig",
    "EnvWorkerConfig",
    "GatewayConfig",
    "GatewayServerConfig",
    "InferenceConfig",
    "LimitsConfig",
    "ModelConfig",
    "MonitorsConfig",
    "MultimodalConfig",
    "OrchestratorConfig",
    "PolicyConfig",
    "RLConfig",
    "RolloutsConfig",
    "SamplingConfig",
    "SlurmConfig",
    "SupervisionConfig",
    "TrainerConfig",
    "TransportConfig",
    "WandbConfig",
    "WorkersConfig",
]
