"""The contract: raw descriptors, `mmraw:` references on the inference wire, `MMRefs` in training samples."""

from pointillist.refs.descriptor import RawImageDescriptor, fingerprint_of, parse_descriptor
from pointillist.refs.mm_refs import MMImageRef, MMRefs, build_mm_refs, mm_token_type_ids
from pointillist.refs.wire import ImageRef, decode_ref, encode_ref

__all__ = [
    "ImageRef",
    "MMImageRef",
    "MMRefs",
    "RawImageDescriptor",
    "build_mm_refs",
    "decode_ref",
    "encode_ref",
    "fingerprint_of",
    "mm_token_type_ids",
    "parse_descriptor",
]
