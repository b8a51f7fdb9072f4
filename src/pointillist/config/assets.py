"""Config of the asset endpoint."""

from pointillist.config.shared import ProcessConfig


class AssetServerConfig(ProcessConfig):
    """The asset endpoint: `pointillist assets @ assets.toml`; it listens where `multimodal.assets` says."""
