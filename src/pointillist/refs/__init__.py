"""An image as words: `MMImageRef` (an image and its place in the tokens), its descriptor, and its `mmraw:` string."""

from pointillist.refs.descriptor import fingerprint_of, make_descriptor, parse_descriptor
from pointillist.refs.mm_refs import MMImageRef, MMRefs, build_mm_refs, mm_token_type_ids
from pointillist.refs.wire import decode_ref, encode_features, encode_ref

__all__ = [
    "MMImageRef",
    "MMRefs",
    "build_mm_refs",
    "decode_ref",
    "encode_features",
    "encode_ref",
    "fingerprint_of",
    "make_descriptor",
    "mm_token_type_ids",
    "parse_descriptor",
]
