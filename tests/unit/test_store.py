import contextlib
import errno
import hashlib
import io
import multiprocessing
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist.base.http_errors import as_request_error
from pointillist.base.image_limits import STORED_LIMITS
from pointillist.errors import ConfigError, ImageError, MissingImageError, RefError, StorageError
from pointillist.images import ImageLimits, ImageStore, inventory, read_verified
from pointillist.images.inventory import StoreEntry, list_store, verify_store
from pointillist.images.store import local_path, write_image
from tests.helpers.files import open_files
from tests.helpers.pictures import encoded, picture

LIMITS = ImageLimits()


def test_put_keeps_the_bytes_under_their_hash(store: ImageStore) -> None:
    data = encoded(picture(20, 10), "JPEG")
    stored = store.put(data)
    sha256 = hashlib.sha256(data).hexdigest()
    assert stored.sha256 == sha256
    assert local_path(stored.uri) == store.root / sha256[:2] / f"{sha256}.jpg"
    assert local_path(stored.uri).read_bytes() == data
    assert (stored.header.width, stored.header.height) == (20, 10)
    assert read_verified(stored.uri, sha256, [store.root], LIMITS) == data


def test_put_is_idempotent_and_repairs(store: ImageStore) -> None:
    data = encoded(picture(8, 8))
    path = local_path(store.put(data).uri)
    before = path.stat()
    store.put(data)
    assert path.stat() == before
    path.write_bytes(data[:-1])
    store.put(data)
    assert path.read_bytes() == data
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(picture(64, 64))[:900]])
def test_put_refuses_before_writing(store: ImageStore, data: bytes) -> None:
    with pytest.raises(ImageError):
        store.put(data)
    assert list(store.root.iterdir()) == []


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What is made, flushed and renamed, in this order; a flushed file by the name that it has at that moment."""
    record: list[tuple[str, Path]] = []

    def recorded(name: str, path_of: Callable[..., Path]) -> None:
        original = getattr(os, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            record.append((name, path_of(*arguments)))
            return original(*arguments, **keywords)

        monkeypatch.setattr(os, name, call)

    recorded("mkdir", lambda path, *_: Path(path))
    recorded("fsync", lambda descriptor: Path(f"/proc/self/fd/{descriptor}").readlink())
    recorded("replace", lambda _, target: Path(target))
    return record


def test_names_are_flushed_and_folders_made_once(store: ImageStore, calls: list[tuple[str, Path]]) -> None:
    root, folder = store.root, store.root / "ab"
    first, second = (folder / f"ab{digit * 62}.png" for digit in "01")
    for path, before in ((first, [("mkdir", folder), ("fsync", root)]), (second, [])):
        calls.clear()
        write_image(path, b"data")
        _, temporary = calls[len(before)]
        assert temporary.name.startswith(f".{path.name}.")
        assert calls == [*before, ("fsync", temporary), ("replace", path), ("fsync", folder)]


def test_a_folder_that_can_not_be_flushed(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_dir():
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    code = errno.EINVAL  # the file system does not do that
    write_image(store.root / "ab" / "ab.png", b"data")
    code = errno.EIO
    with pytest.raises(StorageError, match="could not be stored"):
        write_image(store.root / "ab" / "ab.png", b"data")
    assert [path.name for path in (store.root / "ab").iterdir()] == ["ab.png"]


def test_what_stands_in_the_way_of_a_folder_is_a_storage_error(store: ImageStore) -> None:
    (store.root / "ab").write_text("a file")
    with pytest.raises(StorageError, match="could not be stored"):
        write_image(store.root / "ab" / "ab.png", b"data")
    with pytest.raises(StorageError, match="could not be stored"):
        write_image(store.root / "gone" / "ab" / "ab.png", b"data")


def test_verifying_keeps_the_order_and_few_files_at_once(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        write_image(store.root / f"{number:02d}" / f"{number:02d}{'0' * 62}.png", b"")
    listed = 0

    def counting(root: Path) -> Iterator[StoreEntry]:
        nonlocal listed
        for entry in list_store(root):
            listed += 1
            yield entry

    monkeypatch.setattr(inventory, "list_store", counting)
    names = [entry.path.name for entry in list_store(store.root)]
    taken = []
    for entry in verify_store(store.root, LIMITS, workers=2):
        taken.append(entry.path.name)
        assert entry.condition == "corrupt"
        assert listed - len(taken) <= 8
    assert taken == names


def _put_all(root: Path, seeds: list[int]) -> None:
    store = ImageStore(root, LIMITS)
    for seed in seeds:
        store.put(encoded(picture(16, 16, seed)))


@pytest.mark.integration
def test_many_processes_put_the_same_images(store: ImageStore) -> None:
    context = multiprocessing.get_context("spawn")
    seeds = list(range(20))
    workers = [context.Process(target=_put_all, args=(store.root, seeds[i:] + seeds[:i])) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    files = [path for path in store.root.rglob("*") if path.is_file()]
    assert len(files) == len(seeds)
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


def test_reader_refuses_corruption_links_and_other_names(store: ImageStore, tmp_path: Path) -> None:
    stored = store.put(encoded(picture(8, 8)))
    path, sha256 = local_path(stored.uri), stored.sha256
    roots = [store.root]
    with pytest.raises(RefError, match="hash differs"):
        read_verified(stored.uri, "0" * 64, roots, LIMITS)
    with pytest.raises(RefError, match="at most"):
        read_verified(stored.uri, sha256, roots, ImageLimits(max_bytes=10))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(RefError, match="corrupt"):
        read_verified(stored.uri, sha256, roots, LIMITS)
    outside = tmp_path / "outside.png"
    outside.write_bytes(encoded(picture(8, 8)))
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(RefError, match="symbolic link"):
        read_verified(stored.uri, sha256, roots, LIMITS)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RefError, match="regular file"):
        read_verified(stored.uri, sha256, roots, LIMITS)
    path.unlink()
    with pytest.raises(MissingImageError):
        read_verified(stored.uri, sha256, roots, LIMITS)
    path.parent.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path.parent.symlink_to(elsewhere)
    with pytest.raises(RefError, match="symbolic link"):
        read_verified(stored.uri, sha256, roots, LIMITS)


def test_outside_paths_get_one_answer_whether_or_not_they_exist(store: ImageStore, tmp_path: Path) -> None:
    sha256 = "ab" + "0" * 62
    there = tmp_path / "ab" / f"{sha256}.png"
    there.parent.mkdir()
    there.write_bytes(b"secret")
    answers = set()
    for path in (there, tmp_path / "ac" / f"ac{sha256[2:]}.png", Path("/etc/passwd"), store.root / "notes.txt"):
        with pytest.raises(RefError) as error:
            read_verified(path.as_uri(), path.stem, [store.root], LIMITS)
        answers.add(str(error.value))
    assert len(answers) == 1


@settings(max_examples=500)
@given(st.text(max_size=80))
def test_local_path_gives_an_absolute_path_or_a_ref_error(text: str) -> None:
    for uri in (text, f"file://{text}", f"file:///{text}"):
        try:
            path = local_path(uri)
        except RefError:
            continue
        assert path.is_absolute()
        assert ".." not in path.parts


@pytest.fixture
def no_descriptor_leaks(store: ImageStore) -> Iterator[None]:
    yield
    assert open_files(store.root) == []


_READING_FAULTS = [
    "EIO", "ESTALE", "EACCES", "EPERM", "EISDIR", "ENOTCONN", "EMFILE", "ENFILE", "ENOMEM", "ETIMEDOUT", "EREMOTEIO",
    "ENAMETOOLONG", "EHOSTDOWN", "EBADMSG", "EOVERFLOW", "EAGAIN",
]  # fmt: skip


@pytest.mark.usefixtures("no_descriptor_leaks")
@pytest.mark.parametrize("call", ["open", "read", "fstat"])
@pytest.mark.parametrize("name", _READING_FAULTS)
def test_what_cannot_be_read_now_is_missing(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, call: str, name: str
) -> None:
    stored = store.put(encoded(picture(8, 8)))
    code = getattr(errno, name)

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(MissingImageError, match=name) as raised:
            read_verified(stored.uri, stored.sha256, [store.root], LIMITS)
    assert stored.sha256 in str(raised.value)
    assert read_verified(stored.uri, stored.sha256, [store.root], LIMITS)


@pytest.mark.usefixtures("no_descriptor_leaks")
@pytest.mark.parametrize(
    ("kind", "error"),
    [("folder", MissingImageError), ("fifo", RefError), ("socket", RefError), ("device", RefError), ("link", RefError)],
)
def test_other_things_under_an_images_name(store: ImageStore, tmp_path: Path, kind: str, error: type) -> None:
    stored = store.put(encoded(picture(8, 8)))
    path = local_path(stored.uri)
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("device nodes need root")
    listening = socket.socket(socket.AF_UNIX)
    with listening, contextlib.chdir(path.parent):  # the address of a socket must be short
        if kind == "socket":
            listening.bind(path.name)
    for _ in range(20):
        with pytest.raises(error):
            read_verified(stored.uri, stored.sha256, [store.root], LIMITS)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EIO", "EACCES"])
@pytest.mark.parametrize("call", ["fsync", "open", "mkdir"])
def test_a_disk_that_cannot_be_written_is_not_the_images_fault(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    code = getattr(errno, name)

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    data = encoded(picture(8, 8))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        if call == "open":
            patch.setattr(io, "open", failing)
        with pytest.raises(StorageError, match=os.strerror(code)) as raised:
            store.put(data)
    assert raised.value.retryable
    assert as_request_error(raised.value).status == 503
    assert [path for path in store.root.rglob("*") if path.is_file()] == []
    assert store.put(data).uri  # once there is room


def test_an_unusable_image_folder_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for root in (tmp_path / "file", tmp_path / "file" / "s", tmp_path / "a", tmp_path / "n\0l", Path("/proc/none/s")):
        with pytest.raises(ConfigError, match="image folder"):
            ImageStore(root, LIMITS)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="cannot be written to"):
        ImageStore(tmp_path / "other user's", LIMITS)


def test_a_folder_in_an_images_place_is_a_storage_error_and_a_damaged_file_is_replaced(store: ImageStore) -> None:
    data = encoded(picture(8, 8))
    path = local_path(store.put(data).uri)
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError):
        store.put(data)
    path.rmdir()
    os.mkfifo(path)
    assert local_path(store.put(data).uri).read_bytes() == data


def test_verifying_knows_wrong_extensions_and_large_pictures(store: ImageStore) -> None:
    large = ImageStore(store.root, ImageLimits(max_side=30_000))
    large.put(encoded(picture(20_000, 2), "JPEG"))
    assert [entry.condition for entry in verify_store(store.root, STORED_LIMITS, workers=1)] == ["good"]
    path = local_path(store.put(encoded(picture(8, 8))).uri)
    path.rename(path.with_suffix(".jpg"))
    assert sorted(entry.condition for entry in verify_store(store.root, STORED_LIMITS, workers=1)) == [
        "corrupt",
        "good",
    ]


def test_file_uri_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "with space & ü?#%.png"
    assert local_path(path.as_uri()) == path
