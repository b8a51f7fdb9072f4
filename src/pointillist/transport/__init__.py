"""Floor 3: what orchestrator and trainer say to each other, and how."""

from pointillist.transport.filesystem import FilesystemReceiver, FilesystemSender
from pointillist.transport.types import (
    MicroBatch,
    RankBatch,
    TrainingSample,
    decode_rank_batch,
    encode_rank_batch,
)

__all__ = [
    "FilesystemReceiver",
    "FilesystemSender",
    "MicroBatch",
    "RankBatch",
    "TrainingSample",
    "decode_rank_batch",
    "encode_rank_batch",
]
