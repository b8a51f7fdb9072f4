"""What a server says about its images, in Prometheus' form; the same names for every server."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from pointillist.pixels.cache import ImageCache


class ImageMetrics:
    """Counters of materialising and of its cache."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Adds the counters to a registry."""
        self._images = Counter("pointillist_images_materialized", "Images of prompts, made ready", registry=registry)
        self._seconds = Counter("pointillist_materialize_seconds", "Seconds that requests waited", registry=registry)
        self._cache = {
            name: Gauge(f"pointillist_image_cache_{name}", text, registry=registry)
            for name, text in (
                ("hits", "Images that were decoded already"),
                ("misses", "Images that were decoded"),
                ("bytes_loaded", "Bytes of uint8 pixels that were decoded"),
                ("constant", "Images that were decoded and show (nearly) one colour only"),
                ("bytes", "Bytes of uint8 pixels that are kept"),
            )
        }

    def materialized(self, images: int, seconds: float, cache: ImageCache) -> None:
        """Counts one request's images."""
        self._images.inc(images)
        self._seconds.inc(seconds)
        self._cache["hits"].set(cache.counts.hits)
        self._cache["misses"].set(cache.counts.misses)
        self._cache["bytes_loaded"].set(cache.counts.bytes_loaded)
        self._cache["constant"].set(cache.counts.constant)
        self._cache["bytes"].set(cache.num_bytes)
