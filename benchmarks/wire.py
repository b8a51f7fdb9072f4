"""Claim: references make a training batch small and quick to send.

    python -m benchmarks.wire

A step of 128 samples, each with one 1024x1024 picture and 1,100 tokens, in three designs: processed float32 tensors,
the picture as base64, references. All three have the same tokens and the same encoder (msgspec's msgpack, which copies
bytes and does no more); references go through our own checked functions, the others through the bare encoder.
"""

import base64
import json
import sys
from pathlib import Path

import msgspec

from benchmarks.common import medians, picture, qwen3_vl, scratch, stored_image
from pointillist.images import ImageLimits, ImageStore
from pointillist.images.store import local_path
from pointillist.pixels import RawImageMaterializer
from pointillist.refs import MMRefs
from pointillist.transport import MicroBatch, RankBatch
from pointillist.transport.types import decode_rank_batch, encode_rank_batch, encoded_image_bytes

SAMPLES = 128
TEXT = 76


class Heavy(msgspec.Struct, array_like=True):
    """A batch that carries its pictures."""

    batch: RankBatch
    pixel_values: list[bytes]
    data_urls: list[str]


def main() -> None:
    with scratch() as folder:
        family, store = qwen3_vl(), ImageStore(Path(folder), ImageLimits())
        image = stored_image(family, store, picture(1024, 1024, "JPEG"), offset=TEXT // 2)
        length = image.length
        reader = RawImageMaterializer(family, [store.root], ImageLimits())
        pixels = reader.materialize([image])["pixel_values"].tobytes()
        url = "data:image/jpeg;base64," + base64.b64encode(local_path(image.uri).read_bytes()).decode()
    with_refs = _batch([_row(length, MMRefs([image]))] * SAMPLES)
    bare = _batch([_row(length, None)] * SAMPLES)
    # Every sample has a picture of its own, so its bytes are its own too.
    tensors = Heavy(bare, [bytes(bytearray(pixels)) for _ in range(SAMPLES)], [])
    inline = Heavy(bare, [], [url] * SAMPLES)
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Heavy)
    seconds = medians(
        {
            "refs": lambda: decode_rank_batch(encode_rank_batch(with_refs)),
            "base64": lambda: decoder.decode(encoder.encode(inline)),
            "tensors": lambda: decoder.decode(encoder.encode(tensors)),
        },
        repeats=3,
    )
    per_image = {"tensors": len(pixels), "base64": len(url), "refs": encoded_image_bytes(MMRefs([image]))}
    results = {
        "bytes_per_image": per_image,
        "transport_ms": {name: value * 1000 for name, value in seconds.items()},
        "wire_vs_tensors": per_image["tensors"] / per_image["refs"],
        "wire_vs_base64": per_image["base64"] / per_image["refs"],
        "transport_speedup": seconds["tensors"] / seconds["refs"],
    }
    json.dump(results, sys.stdout, indent=2)


def _row(length: int, refs: MMRefs | None) -> MicroBatch:
    ids = [20] * (TEXT // 2) + [6] * length + [20] * (TEXT // 2)
    size = len(ids)
    return MicroBatch(
        input_ids=ids,
        loss_mask=[index >= size - 20 for index in range(size)],
        advantages=[0.5] * size,
        logprobs_sampled=[-0.25] * size,
        weight_versions=[3] * size,
        temperatures=[1.0] * size,
        mm_token_type_ids=[int(token == 6) for token in ids],
        seq_lens=[size],
        mm_refs=refs,
    )


def _batch(rows: list[MicroBatch]) -> RankBatch:
    return RankBatch(step=1, micro_batches=rows, num_tokens=1, orchestrator_state=b"")


if __name__ == "__main__":
    main()
