"""Who may ask an inference server for what, and what its bodies may be."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from pointillist.errors import RequestError
from pointillist.inference.door import ADMIN_PATHS, OWN_PATHS, Door, http_limits
from pointillist.inference.prompt import ServerBounds, check_sizes, longest_body
from pointillist.inference.protocol import GenerateRequest, SamplingParams, decode_body

JSON = {"content-type": "application/json", "content-length": "2"}


def status(door: Door, path: str, headers: dict[str, str]) -> int:
    """What the door answers a POST; 200 if it lets it pass."""
    given = {"host": "127.0.0.1:8000", **JSON, **headers}
    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"", "scheme": "http", "server": ("a", 1),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip
    try:
        door.check(Request(scope))
    except RequestError as refusal:
        return refusal.status
    return 200


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ADMIN_PATHS)
@pytest.mark.parametrize("key", [None, "api"])
def test_admin_routes_ask_for_the_runs_own_key(path: str, key: str | None) -> None:
    door = Door(loopback=True, key=key, run_key="run")
    assert status(door, path, {}) == status(door, path, bearer("api")) == 401
    assert status(door, path, bearer("run")) == 200
    alone = Door(loopback=True, key=key, run_key=None)  # a server outside of a run
    assert status(alone, path, bearer("api")) == 200
    assert status(alone, path, {}) == (200 if key is None else 401)
    assert status(Door(loopback=False, key=None, run_key=None), path, {}) == 401


def test_other_routes_ask_for_the_api_key_where_there_is_one() -> None:
    door = Door(loopback=True, key="api", run_key="run")
    assert status(door, "/inference/v1/generate", {}) == status(door, "/metrics", bearer("run")) == 401
    assert status(door, "/inference/v1/generate", bearer("api")) == 200
    assert status(door, "/health", {}) == 200
    assert status(Door(loopback=True, key=None, run_key="run"), "/inference/v1/generate", {}) == 200


@pytest.mark.parametrize("path", OWN_PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"host": "evil.example"},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=a"},
    ],
)
def test_pages_and_forms_of_other_sites_are_refused_even_with_the_key(path: str, headers: dict[str, str]) -> None:
    door = Door(loopback=True, key=None, run_key="run")
    assert status(door, path, {**bearer("run"), **headers}) in (400, 403, 415)


def test_the_path_is_not_what_the_client_says_in_host() -> None:
    """`request.url` is made of both: with this one its path would be /health, which needs no key."""
    for loopback in (True, False):
        door = Door(loopback=loopback, key="api", run_key="run")
        for path in OWN_PATHS:
            assert status(door, path, {"host": "127.0.0.1/health?"}) in (400, 401)


@given(st.integers(1, 4096), st.integers(1, 256), st.integers(0, 2))
def test_the_longest_legal_request_is_not_too_long(seq_len: int, images: int, indent: int) -> None:
    count = min(seq_len, images)
    body = {
        "token_ids": [99_999_999] * seq_len,
        "features": {
            "mm_hashes": {"image": ["f" * 64] * count},
            "mm_placeholders": {"image": [{"offset": 10_000_000, "length": 10_000_000}] * count},
            "kwargs_data": {"image": ["x" * 16_384] * count},
        },
        "sampling_params": {"stop_token_ids": [9_999_999] * 1024},
        "request_id": "r" * 256,
        "cache_salt": "s" * 4096,
    }
    data = json.dumps(body, indent=indent or None).encode()
    assert len(data) <= longest_body(seq_len, images) <= http_limits(seq_len, images).inflight_bytes
    assert len(decode_body(data, GenerateRequest).token_ids) == seq_len


def test_an_answer_has_room_for_its_alternatives() -> None:
    bounds = ServerBounds(seq_len=4096, vocab_size=320, max_batch_size=256)
    check_sizes([1], 4000, 256, 0, bounds)  # what training asks for
    check_sizes([1], 4000, 1, 20, bounds)
    for max_tokens in (4000, None):
        with pytest.raises(RequestError, match="alternatives"):
            check_sizes([1], max_tokens, 256, 20, bounds)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [*GenerateRequest.__struct_fields__, "else"]
SAMPLING = [*SamplingParams.__struct_fields__, "else"]


@given(
    st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=4),
    st.dictionaries(st.sampled_from(SAMPLING), JSON_VALUES, max_size=4),
)
def test_any_json_is_a_request_or_a_400(fields: dict[str, object], sampling: dict[str, object]) -> None:
    for body in ({"token_ids": [1], **fields}, {"token_ids": [1], "sampling_params": sampling}, fields):
        try:
            request = decode_body(json.dumps(body).encode(), GenerateRequest)
        except RequestError as error:
            assert error.status == 400 and str(error)
        else:
            assert 0 <= request.sampling_params.temperature <= 100


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_400(data: bytes) -> None:
    with pytest.raises(RequestError):
        decode_body(data, GenerateRequest)


@pytest.mark.parametrize(
    "data",
    [
        b'{"token_ids":' + b"[" * 200_000,
        b'{"token_ids":[1],"else":' + b'{"a":' * 200_000,
        b'{"token_ids":[1],"content_parts":[{"else":' + b"[" * 200_000,
        b'{"token_ids":[1' + b"0" * 5000 + b"]}",
        b'{"token_ids":[1],"sampling_params":{"seed":' + b"9" * 5000 + b"}}",
        b'{"token_ids":[1],"sampling_params":{"temperature":Infinity}}',
        b'{"token_ids":[1],"features":{"mm_hashes":{"image":[' + b"[]," * 100_000 + b"[]]}}}",
        b'{"token_ids":[1],"sampling_params":{"logit_bias":{"1":1}}}',
        b'{"token_ids":[1],"request_id":"\\ud800"}',
        b'{"token_ids":[1],"request_id":"a\\n"}',
    ],
)
def test_bodies_that_others_choke_on_are_400s(data: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        decode_body(data, GenerateRequest)
    assert refused.value.status == 400 and len(str(refused.value)) < 500
