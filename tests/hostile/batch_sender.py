"""A process with the orchestrator's end of the ZMQ transport, which sends batches for ever.

python -m tests.hostile.batch_sender tcp://127.0.0.1:5555
"""

import logging
import sys
from itertools import count

from pointillist.transport.types import MicroBatch, RankBatch
from pointillist.transport.zmq import ZmqSender


def batch(step: int) -> RankBatch:
    """A batch of two rows of eight tokens."""
    tokens = list(range(8))
    row = MicroBatch(
        input_ids=tokens, loss_mask=[True] * 8, advantages=[0.5] * 8, logprobs_sampled=[-1.0] * 8,
        weight_versions=[0] * 8, temperatures=[1.0] * 8, mm_token_type_ids=[0] * 8, seq_lens=[8],
    )  # fmt: skip
    return RankBatch(step=step, micro_batches=[row, row], num_tokens=16, orchestrator_state=b"{}")


def main() -> None:
    """Sends until it is killed; says so once it listens."""
    logging.basicConfig(level=logging.WARNING)
    sender = ZmqSender(sys.argv[1], num_ranks=1, max_pending=4)
    print("ready", sender.address, flush=True)
    for step in count(1):
        sender.send([batch(step)])


if __name__ == "__main__":
    main()
