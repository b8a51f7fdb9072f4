import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pointillist.families import ImageLayout
from pointillist.pixels import LoadedImage
from pointillist.pixels.cache import ImageCache

LAYOUT = ImageLayout((1, 2, 2), 1, 32, 32)


def _image(num_bytes: int) -> LoadedImage:
    return LoadedImage(np.zeros(num_bytes, dtype=np.uint8), LAYOUT)


def test_an_image_is_loaded_once_and_kept() -> None:
    cache, image = ImageCache(1000), _image(10)
    assert cache.get("a", lambda: image) is image
    assert cache.get("a", lambda: pytest.fail("was kept")) is image
    assert (cache.counts.misses, cache.counts.hits, cache.counts.bytes_loaded) == (1, 1, 10)


def test_bytes_are_bounded_and_the_least_recently_used_go_first() -> None:
    cache = ImageCache(100)
    for key in "ab":
        cache.get(key, lambda: _image(40))
    cache.get("a", lambda: pytest.fail("was kept"))
    cache.get("c", lambda: _image(40))
    assert cache.num_bytes == 80
    cache.get("a", lambda: pytest.fail("was used last"))
    loads: list[str] = []
    cache.get("b", lambda: loads.append("b") or _image(40))
    assert loads == ["b"]
    cache.get("huge", lambda: _image(101))  # served, not kept, and nothing is thrown out for it
    assert cache.num_bytes == 80


def test_simultaneous_requests_share_one_load() -> None:
    cache, started, go = ImageCache(0), threading.Event(), threading.Event()

    def load() -> LoadedImage:
        started.set()
        assert go.wait(10)
        return _image(10)

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(cache.get, "a", load)
        assert started.wait(10)
        others = [pool.submit(cache.get, "a", lambda: pytest.fail("is being loaded")) for _ in range(7)]
        while cache.counts.hits < 7:
            pass
        go.set()
        assert {id(future.result()) for future in [first, *others]} == {id(first.result())}


def test_a_failed_load_reaches_all_who_wait_and_is_not_remembered() -> None:
    cache = ImageCache(100)

    def fail() -> LoadedImage:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        cache.get("a", fail)
    assert cache.get("a", lambda: _image(1)).num_bytes == 1
    assert cache.counts.failures == 1
