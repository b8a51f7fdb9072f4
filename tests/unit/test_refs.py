import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointillist.errors import RefError
from pointillist.refs import (
    MMImageRef,
    build_mm_refs,
    decode_ref,
    encode_ref,
    fingerprint_of,
    make_descriptor,
    parse_descriptor,
)

SHA = "ab" * 32
URI = f"file:///store/ab/{SHA}.png"
DESCRIPTOR = make_descriptor("qwen_vl", URI, "0" * 32, {"image_grid_thw": [1, 4, 4]})
REF = MMImageRef(DESCRIPTOR, SHA, URI, 1, 2)
ON_WIRE = {
    "family": "qwen_vl",
    "layout_fingerprint": "0" * 32,
    "modality": "image",
    "hash": SHA,
    "raw_image_uri": URI,
    "payload": {"image_grid_thw": [1, 4, 4]},
}


def test_descriptor_round_trip() -> None:
    assert list(DESCRIPTOR) == ["kind", "family", "raw_image_uri", "layout_fingerprint", "payload"]
    assert DESCRIPTOR["kind"] == "raw_mm_item"
    assert parse_descriptor(json.loads(json.dumps(DESCRIPTOR))) == DESCRIPTOR


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "prime_raw_mm_item"}, "kind"),
        ({"pixel_values": [0.0]}, "pixels are made by the reader"),
        ({"raw_image_id": "x"}, "keys"),
        ({"raw_image_uri": "data:image/png;base64,aaaa"}, "inline"),
        ({"raw_image_uri": "http://host/a.png"}, "file://"),
        ({"raw_image_uri": "file://host/a.png"}, "host"),
        ({"raw_image_uri": "file:///a/../b.png"}, "dotted"),
        ({"raw_image_uri": 5}, "string"),
        ({"family": "Qwen VL"}, "family"),
        ({"layout_fingerprint": "xyz"}, "32 hex"),
        ({"payload": [1]}, "payload"),
    ],
)
def test_descriptor_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RefError, match=message):
        parse_descriptor({**DESCRIPTOR, **change})


@pytest.mark.parametrize(("item", "message"), [(None, "None"), ([1.0], "list"), ("mmraw:", "str")])
def test_descriptor_of_another_kind(item: object, message: str) -> None:
    with pytest.raises(RefError, match=message):
        parse_descriptor(item)


def test_wire_form_is_the_contracts() -> None:
    text = encode_ref(REF)
    assert text.startswith("mmraw:")
    encoded = text.removeprefix("mmraw:")
    assert "=" not in encoded
    value = json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    assert value == ON_WIRE


@given(st.dictionaries(st.text(max_size=5), st.lists(st.integers(-9, 9), max_size=3), max_size=3))
def test_wire_round_trip(payload: dict[str, list[int]]) -> None:
    ref = msgspec.structs.replace(REF, item={**DESCRIPTOR, "payload": payload})
    assert decode_ref(encode_ref(ref), 1, 2) == ref


def _wire(**change: Any) -> str:
    value = {**ON_WIRE, **change}
    return "mmraw:" + base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "every request"),
        (b"bytes", "bytes"),
        ({"pixel_values": 1}, "dict"),
        ("data:image/png;base64,aaaa", "inline"),
        ("gASVabc", "processed tensor"),
        ("mmraw:", "base64url of JSON"),
        ("mmraw:!!!!", "base64url of JSON"),
        ("mmraw:bnVsbA", "NoneType"),
        ("mmraw:" + "A" * 20_000, "characters"),
        (_wire(modality="video"), "modality"),
        (_wire(hash="00"), "sha256"),
        (_wire(hash=None), "sha256"),
        (_wire(extra=1), "keys"),
        (_wire(family=None), "family"),
        (_wire(payload=None), "payload"),
        (_wire(raw_image_uri="file://relative"), "host|absolute"),
    ],
)
def test_wire_refusals(text: object, message: str) -> None:
    with pytest.raises(RefError, match=message):
        decode_ref(text, 0, 1)


@pytest.mark.slow
@settings(max_examples=1000)
@given(
    st.one_of(
        st.text(max_size=60),
        st.binary(max_size=60).map(lambda raw: "mmraw:" + base64.urlsafe_b64encode(raw).decode()),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ON_WIRE, "x"]), inner, max_size=6)
            ),
        ).map(lambda value: "mmraw:" + base64.urlsafe_b64encode(json.dumps(value).encode()).decode()),
    )
)
def test_any_text_decodes_or_is_refused(text: str) -> None:
    try:
        ref = decode_ref(text, 0, 1)
    except RefError:
        return
    assert isinstance(ref, MMImageRef)


TYPES = [0, 1, 1, 0, 1, 1, 1, 0]
PLACES = [{"offset": 1, "length": 2}, {"offset": 4, "length": 3}]
ITEMS = [DESCRIPTOR] * 2


def test_mm_refs_are_built_in_token_order() -> None:
    refs = build_mm_refs(ITEMS, [SHA] * 2, PLACES, TYPES)
    assert refs is not None
    assert [(image.offset, image.length) for image in refs.images] == [(1, 2), (4, 3)]
    assert refs.images[0] == REF
    assert build_mm_refs([], [], [], [0, 0]) is None


@pytest.mark.parametrize(
    ("items", "hashes", "places", "types", "message"),
    [
        (ITEMS[:1], [SHA] * 2, PLACES, TYPES, "1 descriptors, 2 hashes"),
        (ITEMS, [SHA, None], PLACES, TYPES, r"image\[1\].*sha256"),
        (ITEMS, [SHA] * 2, PLACES[::-1], TYPES, "unsorted|no image"),
        (ITEMS, [SHA] * 2, [PLACES[0], {"offset": 2, "length": 3}], TYPES, "overlapping"),
        (ITEMS, [SHA] * 2, [PLACES[0], {"offset": 4, "length": 0}], TYPES, "> 0"),
        (ITEMS, [SHA] * 2, [PLACES[0], {"offset": 4.0, "length": 3}], TYPES, "integers"),
        (ITEMS, [SHA] * 2, [PLACES[0], {"offset": True, "length": 3}], TYPES, "integers"),
        (ITEMS, [SHA] * 2, [PLACES[0], (4, 3)], TYPES, "placeholder is"),
        (ITEMS, [SHA] * 2, [PLACES[0], {"offset": 4, "length": 4}], TYPES, "not image tokens"),
        (ITEMS, [SHA] * 2, [PLACES[0], {"offset": 4, "length": 9}], TYPES, "has 8 tokens"),
        (ITEMS, [SHA] * 2, [PLACES[0], {"offset": 4, "length": 2}], TYPES, "without an image"),
        (ITEMS[:1], [SHA], PLACES[1:], TYPES, "without an image"),
        ([], [], [], TYPES, "without an image"),
        ([], [], [], [0, 2], "video"),
        ([None], [SHA], PLACES[:1], TYPES, "None"),
    ],
)
def test_mm_refs_refusals(
    items: list[Any], hashes: list[Any], places: list[Any], types: list[int], message: str
) -> None:
    with pytest.raises(RefError, match=message):
        build_mm_refs(items, hashes, places, types)


def test_fingerprint_depends_on_every_field_and_not_on_order() -> None:
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    assert fingerprint_of({"a": 1, "b": 2}) != fingerprint_of({"a": 1, "b": 3})
    assert len(fingerprint_of({})) == 32
