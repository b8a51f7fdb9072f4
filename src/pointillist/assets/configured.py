"""The reader's side of `multimodal.assets`, from config: one place for images and weights alike."""

from pathlib import Path

from pointillist.assets.cache import FetchedImages
from pointillist.assets.client import AssetClient
from pointillist.base.net import key_from_environment
from pointillist.config import MultimodalConfig


def asset_client(multimodal: MultimodalConfig) -> AssetClient | None:
    """The client of the run's asset endpoints; None if there are none.

    Raises:
        ConfigError: The variable of their key is not set.
    """
    assets = multimodal.assets
    if not assets.urls:
        return None
    key = key_from_environment(assets.api_key_var, "the asset endpoint's key")
    return AssetClient(assets.urls, key, assets.timeout)


def fetched_images(multimodal: MultimodalConfig, output_dir: Path) -> FetchedImages | None:
    """The reader's store of fetched images; None if there is no endpoint.

    Raises:
        ConfigError: As `asset_client`.
    """
    client = asset_client(multimodal)
    if client is None:
        return None
    root = multimodal.assets.cache_dir or output_dir / "assets" / "fetched"
    return FetchedImages(
        root.expanduser().absolute(), multimodal.assets.cache_bytes, client, multimodal.limits.image_limits()
    )
