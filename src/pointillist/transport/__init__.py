"""What orchestrator and trainer say to each other, and how."""

from pointillist.transport.ends import Receiver, Sender, make_receiver, make_sender
from pointillist.transport.filesystem import FilesystemReceiver, FilesystemSender
from pointillist.transport.types import MicroBatch, RankBatch, TrainingSample, decode_rank_batch, encode_rank_batch
from pointillist.transport.zmq import ZmqReceiver, ZmqSender

__all__ = [
    "FilesystemReceiver",
    "FilesystemSender",
    "MicroBatch",
    "RankBatch",
    "Receiver",
    "Sender",
    "TrainingSample",
    "ZmqReceiver",
    "ZmqSender",
    "decode_rank_batch",
    "encode_rank_batch",
    "make_receiver",
    "make_sender",
]
