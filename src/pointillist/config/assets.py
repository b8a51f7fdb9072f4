"""Config of the asset endpoint."""

from pathlib import Path

from pointillist.config.base import Config
from pointillist.config.shared import LogLevel, MultimodalConfig


class AssetServerConfig(Config):
    """The asset endpoint: `pointillist assets @ assets.toml`; it listens where `multimodal.assets` says."""

    output_dir: Path = Path("outputs/run")
    multimodal: MultimodalConfig = MultimodalConfig()
    log_level: LogLevel = "info"
