"""A cluster on paper: the scenario, what its caches hold, how its requests queue, what its references weigh.

Part of `python -m benchmarks.scaling`. Caches and packing are the real classes, fed with a made-up trace; the file
system is a model: one queue of metadata requests and several of data.
"""

import heapq
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np

from benchmarks.common import medians, qwen3_vl
from pointillist.families import ImageLayout, place_image
from pointillist.images import ImageHeader, StoredImage
from pointillist.orchestrator.packing import pack
from pointillist.pixels import LoadedImage
from pointillist.pixels.cache import ImageCache
from pointillist.refs import MMImageRef, MMRefs, encode_ref
from pointillist.transport import MicroBatch, RankBatch, TrainingSample
from pointillist.transport.types import decode_rank_batch, encode_rank_batch, encoded_image_bytes

Routing = Literal["any server", "a server a rollout", "a server a group"]
ROUTINGS: Final[tuple[Routing, ...]] = ("any server", "a server a rollout", "a server a group")
MIB: Final = 1024**2
CACHE_MIB: Final = (0, 256, 1024, 4096, 1_000_000)
_TURN_SECONDS: Final = 20.0
# Packing is first fit by length, so tokens may be counted in units; 1/64 of the lists is 1/64 of the time.
_PACKING_UNIT: Final = 64
_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is assumed of a run. Nothing here is measured."""

    inference_gpus: int = 600
    training_gpus: int = 400
    gpus_per_server: int = 4
    groups: int = 512
    """Tasks a step."""
    group_size: int = 16
    turns: int = 8
    """Requests a rollout; the first shows the task's picture, each later one adds one that a tool made."""
    repeated_share: float = 0.1
    """Part of the tools' pictures whose bytes were stored before."""
    image_bytes: int = 400_000
    width: int = 1024
    height: int = 768
    text_tokens: int = 2_000
    """A rollout's tokens that are no picture's."""
    seq_len: int = 32_768
    step_seconds: float = 300.0
    images_total: int = 100_000_000
    """Distinct pictures of the whole run."""
    weight_bytes: int = 16_000_000_000
    """Of one version of the model: 8 x 10^9 parameters of two bytes."""

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.inference_gpus + self.training_gpus

    @property
    def servers(self) -> int:
        """Inference servers, each with a cache of its own."""
        return self.inference_gpus // self.gpus_per_server

    @property
    def rollouts(self) -> int:
        """A step."""
        return self.groups * self.group_size

    @property
    def spans(self) -> int:
        """Pictures in the samples of a step, each as often as it occurs."""
        return self.rollouts * self.turns

    @property
    def distinct(self) -> float:
        """New files a step."""
        return self.groups + self.rollouts * (self.turns - 1) * (1 - self.repeated_share)

    @property
    def shown(self) -> int:
        """References in all requests of a step: the n-th request of a rollout shows n pictures."""
        return self.rollouts * self.turns * (self.turns + 1) // 2

    @property
    def patch_bytes(self) -> int:
        """A picture's uint8 patches, which is what the cache keeps."""
        return self.width * self.height * 3

    @property
    def image_tokens(self) -> int:
        """A picture's tokens: one a square of 32 pixels."""
        return self.width * self.height // 32**2

    @property
    def tokens(self) -> int:
        """A rollout's."""
        return self.turns * self.image_tokens + self.text_tokens

    def times(self, factor: int) -> "Scenario":
        """A run on so many times the GPUs, with as many times the groups a step."""
        return replace(
            self,
            inference_gpus=self.inference_gpus * factor,
            training_gpus=self.training_gpus * factor,
            groups=self.groups * factor,
        )


def _picture_keys(scenario: Scenario, group: int, member: int, random: np.random.Generator) -> list[str]:
    """The pictures of one rollout; some of a tool's are those that another rollout of the group has, too."""
    keys = [f"{group}"]
    for turn in range(1, scenario.turns):
        repeated = random.random() < scenario.repeated_share
        keys.append(f"{group}-{turn}" if repeated else f"{group}-{member}-{turn}")
    return keys


def _requests(scenario: Scenario, routing: Routing) -> Iterator[tuple[float, int, list[str]]]:
    """Two steps of requests in the order of time: when, to which server, with which pictures.

    Groups begin evenly over time. A group's first requests are one, as the client gathers them.
    """
    random = np.random.default_rng(_SEED)
    requests = []
    for group in range(2 * scenario.groups):
        begin = random.uniform(0, 2 * scenario.step_seconds)
        group_server = int(random.integers(scenario.servers))
        requests.append((begin, group_server, [f"{group}"]))
        for member in range(scenario.group_size):
            keys = _picture_keys(scenario, group, member, random)
            own_server = int(random.integers(scenario.servers))
            now = begin
            for turn in range(2, scenario.turns + 1):
                now += random.lognormal(np.log(_TURN_SECONDS) - 0.125, 0.5)  # of mean _TURN_SECONDS
                if routing == "any server":
                    server = int(random.integers(scenario.servers))
                else:
                    server = own_server if routing == "a server a rollout" else group_server
                requests.append((now, server, keys[:turn]))
    requests.sort(key=lambda request: request[0])
    yield from requests


def server_caches(scenario: Scenario) -> list[dict[str, Any]]:
    """References of a step that the servers' caches do not answer, by routing and size of cache.

    The first step fills the caches, the second is counted.
    """
    layout = ImageLayout((1, 2, 2), 1, scenario.width, scenario.height)
    # One byte of memory that counts as a whole picture.
    image = LoadedImage(np.broadcast_to(np.uint8(0), (scenario.patch_bytes,)), layout)
    rows = []
    for routing in ROUTINGS:
        requests = list(_requests(scenario, routing))
        for mib in CACHE_MIB:
            caches = [ImageCache(mib * MIB) for _ in range(scenario.servers)]
            shown = misses = 0
            for when, server, keys in requests:
                cache = caches[server]
                before = cache.counts.misses
                for key in keys:
                    cache.get(key, lambda: image)
                if scenario.step_seconds <= when < 2 * scenario.step_seconds:
                    shown += len(keys)
                    misses += cache.counts.misses - before
            rows.append({"routing": routing, "cache_mib": mib, "shown": shown, "misses": misses})
    return rows


def trainer_reads(scenario: Scenario) -> dict[str, float]:
    """Pictures that the ranks load for one step, its samples packed by the real `pack`, each rank with its cache."""
    random = np.random.default_rng(_SEED)
    samples = []
    for group in range(scenario.groups):
        for member in range(scenario.group_size):
            keys = _picture_keys(scenario, group, member, random)
            text = int(scenario.text_tokens * random.lognormal(-0.125, 0.5))
            length = (scenario.turns * scenario.image_tokens + text) // _PACKING_UNIT
            samples.append(_sample([1] * length, [MMImageRef({}, key, key, 0, 1) for key in keys]))
    ranks = pack(samples, seq_len=scenario.seq_len // _PACKING_UNIT, num_workers=scenario.training_gpus)
    layout = ImageLayout((1, 2, 2), 1, scenario.width, scenario.height)
    image = LoadedImage(np.broadcast_to(np.uint8(0), (scenario.patch_bytes,)), layout)
    loads, most = 0, 0
    for rank in ranks:
        cache = ImageCache(256 * MIB)
        for row in rank:
            for key in dict.fromkeys(ref.hash for ref in row.mm_refs.images) if row.mm_refs else ():
                cache.get(key, lambda: image)
        loads += cache.counts.misses
        most = max(most, cache.counts.misses)
    spans = sum(len(sample.mm_refs.images) for sample in samples if sample.mm_refs)
    return {"spans": spans, "rows_per_rank": len(ranks[0]), "loads": loads, "most_of_one_rank": most}


def _sample(tokens: list[int], images: list[MMImageRef]) -> TrainingSample:
    zeros = [0.0] * len(tokens)
    return TrainingSample(
        token_ids=tokens,
        loss_mask=[False] * len(tokens),
        logprobs_sampled=zeros,
        advantages=zeros,
        weight_versions=tokens,
        temperatures=zeros,
        mm_token_type_ids=tokens,
        mm_refs=MMRefs(images),
    )


def references(scenario: Scenario) -> dict[str, float]:
    """Bytes of references and of tokens, and the time that the tokens' encoding takes, by the real encoders."""
    family = qwen3_vl()
    layout = family.layout(scenario.width, scenario.height)
    sha256 = "3a" * 32
    uri = f"file:///data/outputs/run_0123456789abcdef/assets/images/3a/{sha256}.jpg"
    stored = StoredImage(sha256, uri, ImageHeader("jpg", scenario.width, scenario.height), 0)
    image = place_image(family, stored, layout, 0)
    rollouts = 16
    batch = RankBatch(
        step=1, micro_batches=[_row(scenario, image) for _ in range(rollouts)], num_tokens=1, orchestrator_state=b""
    )
    data = encode_rank_batch(batch)
    seconds = medians({"encode": lambda: encode_rank_batch(batch), "decode": lambda: decode_rank_batch(data)}, 5)
    tracemalloc.start()
    held = decode_rank_batch(data)
    held_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del held
    image_bytes = encoded_image_bytes(MMRefs([image] * 1000)) / 1000
    tokens = rollouts * scenario.tokens
    return {
        "image_tokens": layout.num_tokens,
        "wire_bytes_per_image": len(encode_ref(image)),
        "sample_bytes_per_image": image_bytes,
        "sample_bytes_per_token": (len(data) - rollouts * scenario.turns * image_bytes) / tokens,
        "held_bytes_per_token": held_bytes / tokens,
        "encode_us_per_token": seconds["encode"] / tokens * 1e6,
        "decode_us_per_token": seconds["decode"] / tokens * 1e6,
    }


def _row(scenario: Scenario, image: MMImageRef) -> MicroBatch:
    """One rollout: turn by turn a picture and text, of which the policy wrote half."""
    random = np.random.default_rng(_SEED)
    text = scenario.text_tokens // scenario.turns
    turn = scenario.image_tokens + text
    kinds = ([1] * scenario.image_tokens + [0] * text) * scenario.turns
    mask = ([False] * (turn - text // 2) + [True] * (text // 2)) * scenario.turns
    words = random.integers(0, 150_000, len(kinds)).tolist()
    logprobs = (-random.random(len(kinds))).tolist()
    return MicroBatch(
        input_ids=[151_655 if kind else word for kind, word in zip(kinds, words, strict=True)],
        loss_mask=mask,
        advantages=[0.5 if trained else 0.0 for trained in mask],
        logprobs_sampled=[value if trained else 0.0 for value, trained in zip(logprobs, mask, strict=True)],
        weight_versions=[1000 if trained else -1 for trained in mask],
        temperatures=[1.0] * len(kinds),
        mm_token_type_ids=kinds,
        seq_lens=[len(kinds)],
        mm_refs=MMRefs([image.moved(number * turn) for number in range(scenario.turns)]),
    )


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A shared file system as the simulation has it. All of it is assumed."""

    metadata_per_second: float
    data_servers: int = 20
    bytes_per_second: float = 1e9
    """Of one data server."""
    round_trip: float = 0.0003
    flush_seconds: float = 0.002


@dataclass(frozen=True, slots=True)
class Operation:
    """One put or read as the file system sees it."""

    metadata: int
    """Requests to the metadata server, one after the other."""
    num_bytes: int
    flushes: int = 0
    """Of the file and of its folder, one after the other."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When operations of one kind begin."""

    name: str
    operation: Operation
    times: Sequence[float]


def poisson(per_second: float, seconds: float, seed: int) -> list[float]:
    """Moments of independent arrivals, in order."""
    random = np.random.default_rng(seed)
    return sorted(random.uniform(0, seconds, random.poisson(per_second * seconds)).tolist())


def queueing(arrivals: Sequence[Arrivals], system: FileSystem) -> dict[str, dict[str, float]]:
    """Latencies of operations on a file system that serves metadata by one queue and data by several.

    Metadata requests of an operation follow one another; service times are exponential. Then the bytes go through
    the queue of a data server drawn by chance; flushes are added to those of a put.

    Returns:
        Per kind: median and 99th percentile in milliseconds.
    """
    random = np.random.default_rng(_SEED)
    metadata_free = 0.0
    data_free = [0.0] * system.data_servers
    events: list[tuple[float, int, int, int]] = []  # when, tie breaker, operation, metadata requests still to make
    operations: list[tuple[str, Operation, float]] = []
    for kind in arrivals:
        for when in kind.times:
            events.append((when, len(operations), len(operations), kind.operation.metadata))
            operations.append((kind.name, kind.operation, when))
    heapq.heapify(events)
    latencies: dict[str, list[float]] = {kind.name: [] for kind in arrivals}
    number = len(operations)
    while events:
        now, _, which, left = heapq.heappop(events)
        name, operation, began = operations[which]
        if left:
            metadata_free = max(metadata_free, now) + random.exponential(1 / system.metadata_per_second)
            number += 1
            heapq.heappush(events, (metadata_free + system.round_trip, number, which, left - 1))
            continue
        server = int(random.integers(system.data_servers))
        data_free[server] = max(data_free[server], now) + operation.num_bytes / system.bytes_per_second
        flushes = operation.flushes * system.flush_seconds
        latencies[name].append(data_free[server] + system.round_trip + flushes - began)
    return {
        name: {"median_ms": float(np.median(taken)) * 1e3, "p99_ms": float(np.percentile(taken, 99)) * 1e3}
        for name, taken in latencies.items()
        if taken
    }
