"""What a thousand GPUs and a hundred million images ask of a shared file system: the numbers of docs/scaling.md.

    python -m benchmarks.scaling             # measures, simulates, writes results/scaling.json and the page's tables
    python -m benchmarks.scaling durability  # only this section anew
    python -m benchmarks.scaling tables      # only the tables, from results/scaling.json

Needs strace. Takes five minutes and 400,000 files in the folder for temporary files.
"""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import accumulate, dropwhile, takewhile
from pathlib import Path
from typing import Any, Final

from benchmarks.scaling_assets import assets
from benchmarks.scaling_cluster import (
    Arrivals,
    FileSystem,
    Operation,
    Routing,
    Scenario,
    poisson,
    queueing,
    references,
    server_caches,
    trainer_reads,
)
from benchmarks.scaling_store import SECTIONS as STORE_SECTIONS
from pointillist.transport.filesystem import poll_seconds

RESULTS: Final = Path(__file__).parent / "results" / "scaling.json"
PAGE: Final = Path(__file__).parent.parent / "docs" / "scaling.md"
FAN_OUTS: Final = (256, 65_536)
IMAGE_BYTES: Final = (200_000, 400_000, 1_000_000)
# What metadata servers are assumed to sustain, requests a second: a small filer, a good one, a spread one.
CAPACITIES: Final = (10_000, 50_000, 200_000)
FACTORS: Final = (1, 4, 10)
LINK_BYTES: Final = 1.25e9
"""Assumed network of the asset endpoint's machine, bytes a second."""
AT_THE_REFERENCE: Final[Routing] = "a server a group"
"""What the client does with several servers: `sessions/servers.py`."""
LOOKUP_SECONDS: Final = 0.0003
"""Assumed round trip of one metadata request."""
# ext4: a name of 68 characters in a block of 4 KiB; the root of its index holds 508 blocks, each of these 511.
EXT4_LEAVES: Final = 508 * 511
EXT4_BLOCK: Final = 4096
UNBOUNDED_MIB: Final = 1_000_000
_WINDOW: Final = 10.0

Results = Mapping[str, Any]


def entries_per_folder(images: float, fan_out: int) -> float:
    """Names in one folder; hashes spread evenly."""
    return images / fan_out


def requests_of(calls: Mapping[str, int]) -> int:
    """Requests to the metadata server, if the client caches nothing: calls with a path, closes, flushes of a folder."""
    return calls["name"] + calls["close"] + calls.get("folder_fsync", 0)


def lookups(begin: float, end: float) -> float:
    """How often a second a rank that waits for its batch looks for it, between two moments of its waiting."""
    moments = accumulate(poll_seconds(), initial=0.0)
    within = takewhile(lambda moment: moment < end, dropwhile(lambda moment: moment < begin, moments))
    return sum(1 for _ in within) / (end - begin)


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """One kind of operation in a step."""

    name: str
    operations: float
    """A step."""
    requests: int
    """To the metadata server, one operation."""
    num_bytes: float
    """Through the network, one operation."""

    def requests_per_second(self, scenario: Scenario) -> float:
        """To the metadata server."""
        return self.operations * self.requests / scenario.step_seconds

    def bytes_per_second(self, scenario: Scenario) -> float:
        """From or to the data servers."""
        return self.operations * self.num_bytes / scenario.step_seconds


def server_misses(results: Results, routing: Routing, cache_mib: int) -> dict[str, float]:
    """The row of the simulated caches."""
    (row,) = (r for r in results["server_caches"] if r["routing"] == routing and r["cache_mib"] == cache_mib)
    return dict(row)


def miss_share(row: Mapping[str, Any]) -> float:
    """Part of the references that a cache does not answer."""
    return float(row["misses"] / row["shown"])


def traffic(
    results: Results, scenario: Scenario, routing: Routing = AT_THE_REFERENCE, cache_mib: int = 256
) -> list[Traffic]:
    """What a step asks of the file system, rollouts with conversations of their own."""
    calls, size = results["calls"], scenario.image_bytes
    missed = scenario.shown * miss_share(server_misses(results, routing, cache_mib))
    loads = scenario.spans * results["trainer_reads"]["loads"] / results["trainer_reads"]["spans"]
    return [
        Traffic("puts of new images", scenario.distinct, requests_of(calls["put_new"]), size),
        Traffic("puts of known images", scenario.spans - scenario.distinct, requests_of(calls["put_known"]), size),
        Traffic("reads of servers", missed, requests_of(calls["read"]), size),
        Traffic("reads of trainers", loads, requests_of(calls["read"]), size),
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Fetches:
    """One kind of request to the asset endpoint in a step."""

    name: str
    operations: float
    """A step."""
    num_bytes: float
    core_seconds: float
    """Of the endpoint, one operation, as measured."""


def fetches(results: Results, scenario: Scenario) -> list[Fetches]:
    """What a step asks of one asset endpoint if no reader shares a file system with it.

    Each server and rank has a store of its own, which holds what it fetches for much longer than a step: a picture
    comes once to each server that shows it.
    """
    pictures = traffic(results, scenario, cache_mib=UNBOUNDED_MIB)[2:]
    per_picture = results["assets"]["core_ms_per_picture"] / 1e3
    per_version = results["assets"]["core_seconds_per_gb_of_weights"] * scenario.weight_bytes / 1e9
    return [
        *(Fetches(f"pictures: {kind.name}", kind.operations, kind.num_bytes, per_picture) for kind in pictures),
        Fetches("weights, one version a server", scenario.servers, scenario.weight_bytes, per_version),
    ]


def gateway_traffic(results: Results, scenario: Scenario) -> Traffic:
    """What comes on top if every request brings its whole history, which is put again."""
    again = scenario.shown - scenario.spans
    return Traffic("puts of history (gateway)", again, requests_of(results["calls"]["put_known"]), scenario.image_bytes)


def total_requests(kinds: list[Traffic], scenario: Scenario) -> float:
    """Metadata requests a second."""
    return sum(kind.requests_per_second(scenario) for kind in kinds)


def total_bytes(kinds: list[Traffic], scenario: Scenario) -> float:
    """Bytes a second, both ways."""
    return sum(kind.bytes_per_second(scenario) for kind in kinds)


def ext4_entries(results: Results) -> float:
    """Names that one folder of ext4 takes with two levels of index, at the measured bytes a name."""
    return EXT4_LEAVES * EXT4_BLOCK / bytes_per_entry(results)


def bytes_per_entry(results: Results) -> float:
    """Of a folder, as measured in the fullest."""
    fullest = results["folder_sizes"][-1]
    return float(fullest["folder_mb"] * 1e6 / fullest["entries"])


def queueing_rows(results: Results) -> list[dict[str, Any]]:
    """The reference scenario and its multiples on file systems of several capacities, for ten seconds each."""
    rows: list[dict[str, Any]] = []
    for factor in FACTORS:
        scenario = Scenario().times(factor)
        kinds = traffic(results, scenario)
        for capacity in CAPACITIES:
            row: dict[str, Any] = {
                "gpus": scenario.gpus,
                "capacity": capacity,
                "load": total_requests(kinds, scenario) / capacity,
            }
            if row["load"] < 1:
                row |= queueing([_spread(kind, scenario) for kind in kinds], FileSystem(capacity))
            rows.append(row)
    return rows


def _spread(kind: Traffic, scenario: Scenario) -> Arrivals:
    per_second = kind.operations / scenario.step_seconds
    operation = Operation(kind.requests, int(kind.num_bytes), flushes=2 if kind.name == "puts of new images" else 0)
    return Arrivals(kind.name, operation, poisson(per_second, _WINDOW, seed=kind.requests))


def burst_rows(results: Results) -> list[dict[str, Any]]:
    """All ranks load their first row at the same moment; all rollouts of a step put their first picture."""
    scenario, calls = Scenario(), results["calls"]
    a_row = scenario.training_gpus * scenario.seq_len // scenario.tokens * scenario.turns
    read = Operation(requests_of(calls["read"]), scenario.image_bytes)
    put = Operation(requests_of(calls["put_new"]), scenario.image_bytes, flushes=2)
    rows = []
    for name, operation, number in (
        ("every rank loads its first row", read, a_row),
        ("every rollout puts its first picture", put, scenario.rollouts),
    ):
        for capacity in CAPACITIES:
            latency = queueing([Arrivals(name, operation, [0.0] * number)], FileSystem(capacity))[name]
            rows.append({"burst": name, "operations": number, "capacity": capacity, **latency})
    return rows


SECTIONS: Final[dict[str, Callable[[], Any]]] = {
    **STORE_SECTIONS,
    "server_caches": lambda: server_caches(Scenario()),
    "trainer_reads": lambda: trainer_reads(Scenario()),
    "references": lambda: references(Scenario()),
    "assets": lambda: assets(Scenario().image_bytes),
}
"""Measured or simulated by themselves; queueing follows from them."""


def measure(names: list[str]) -> None:
    """Runs sections and writes the results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        print(f"running {name}", file=sys.stderr)
        results[name] = SECTIONS[name]()
    results["date"] = datetime.now(UTC).date().isoformat()
    results["machine"] = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {platform.python_version()}"
    results["queueing"], results["bursts"] = queueing_rows(results), burst_rows(results)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def number(value: float, digits: int = 3) -> str:
    """With so many digits that count, and commas."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:g}"


def scenario_table(_: Results) -> str:
    """What is assumed."""
    s = Scenario()
    rows = [
        ("GPUs", "", f"{s.gpus:,}"),
        ("of these for inference, a server", "", f"{s.inference_gpus} in {s.servers} servers"),
        ("of these for training, one rank each", "`R`", f"{s.training_gpus}"),
        ("groups a step", "`G`", f"{s.groups}"),
        ("rollouts a group", "`n`", f"{s.group_size}"),
        ("requests a rollout; the first shows 1 picture, each later one 1 more", "`T`", f"{s.turns}"),
        ("pictures of tools whose bytes were stored before", "`q`", f"{s.repeated_share:.0%}"),
        ("bytes a picture (JPEG, 1024x768)", "`b`", f"{s.image_bytes:,}"),
        ("seconds a step", "`t`", f"{s.step_seconds:.0f}"),
        ("tokens of text a rollout", "", f"{s.text_tokens:,}"),
        ("distinct pictures of the run", "`N`", f"{s.images_total:,}"),
        ("GB of one version of the weights", "", number(s.weight_bytes / 1e9)),
    ]
    return table(["assumed", "", "value"], [list(row) for row in rows])


def volume_table(results: Results) -> str:
    """What follows from the scenario alone, and the size of folders."""
    s = Scenario()
    steps = s.images_total / s.distinct
    rows = [
        ["rollouts a step", "`G n`", f"{s.rollouts:,}"],
        ["pictures in the samples of a step", "`G n T`", f"{s.spans:,}"],
        ["references in the requests of a step", "`G n T (T + 1) / 2`", f"{s.shown:,}"],
        ["new files a step", "`G + G n (T - 1) (1 - q)`", f"{s.distinct:,.0f}"],
        ["puts a new file", "`G n T` / new files", f"{s.spans / s.distinct:.2f}"],
        ["steps until `N` files", "`N` / new files", f"{steps:,.0f}"],
        ["days until then", "steps x `t`", f"{steps * s.step_seconds / 86_400:.1f}"],
    ]
    rows += [
        [f"TB at {size // 1000:,} KB a picture", "`N b`", f"{s.images_total * size / 1e12:,.0f}"]
        for size in IMAGE_BYTES
    ]
    for fan_out in FAN_OUTS:
        entries = entries_per_folder(s.images_total, fan_out)
        megabytes = entries * bytes_per_entry(results) / 1e6
        rows.append([f"entries a folder, {fan_out:,} folders", f"`N` / {fan_out:,}", f"{entries:,.0f}"])
        rows.append(["MB of one such folder itself, on ext4", "entries x measured bytes", number(megabytes, 2)])
    rows.append(["GB of all folders, on ext4", "", number(s.images_total * bytes_per_entry(results) / 1e9, 2)])
    return table(["computed", "formula", "value"], rows)


def folder_table(results: Results) -> str:
    """Time against entries."""
    head = ["entries in the folder", "folder, MB", "put, µs", "read, µs", "lookup of a new name, µs", "listing, ms"]
    rows = []
    for row in results["folder_sizes"]:
        pairs = [
            f"{row[what]:.{d}f} / {row[what + '_small']:.{d}f}" for what, d in (("put", 0), ("read", 0), ("lookup", 1))
        ]
        rows.append([f"{row['entries']:,}", number(row["folder_mb"], 2), *pairs, number(row["list_ms"], 2)])
    return table(head, rows)


def calls_table(results: Results) -> str:
    """Calls of the real code."""
    names = {"put_new": "put of a new image", "put_known": "put of a known image", "read": "verified read"}
    rows = []
    for key, name in names.items():
        calls = results["calls"][key]
        counts = [str(calls.get(kind, 0)) for kind in ("name", "close", "fsync", "folder_fsync", "data")]
        rows.append([name, *counts, str(requests_of(calls))])
    head = ["operation", "with a path", "close", "fsync of the file", "of the folder", "read, write"]
    return table([*head, "metadata requests, at most"], rows)


def caches_table(results: Results) -> str:
    """Hit rates by routing and size."""
    rows = []
    for row in results["server_caches"]:
        size = "unbounded" if row["cache_mib"] == UNBOUNDED_MIB else f"{row['cache_mib']:,}"
        if row["cache_mib"]:
            rows.append([row["routing"], size, f"{1 - miss_share(row):.1%}", f"{row['misses']:,}"])
    return table(["a rollout's requests go to", "cache of a server, MiB", "hits", "loads a step"], rows)


def traffic_table(results: Results) -> str:
    """Requests and bytes a second."""
    s = Scenario()
    kinds = traffic(results, s)
    rows = []
    for kind in [*kinds, gateway_traffic(results, s)]:
        requests, megabytes = kind.requests_per_second(s), kind.bytes_per_second(s) / 1e6
        rows.append([kind.name, f"{kind.operations:,.0f}", str(kind.requests), f"{requests:,.0f}", f"{megabytes:,.0f}"])
    sums = {
        "sum without gateway": kinds,
        "sum with gateway": [*kinds, gateway_traffic(results, s)],
        "sum without gateway, caches of 1 GiB": traffic(results, s, cache_mib=1024),
        "sum without gateway, no caches in servers": traffic(results, s, cache_mib=0),
        "sum without gateway, if any server got a request": traffic(results, s, "any server"),
    }
    for name, summed in sums.items():
        rows.append([name, "", "", f"{total_requests(summed, s):,.0f}", f"{total_bytes(summed, s) / 1e6:,.0f}"])
    for name, begin, end in (("their first second", 0.0, 1.0), ("after ten seconds", 10.0, 60.0)):
        polls = s.training_gpus * lookups(begin, end)
        rows.append([f"ranks that wait for a batch through files, {name}", "", "1", f"{polls:,.0f}", "0"])
    return table(["what", "operations a step", "requests each", "metadata requests/s", "MB/s"], rows)


def queueing_table(results: Results) -> str:
    """Latency under load."""
    rows = []
    for row in results["queueing"]:
        cells = ["-", "-", "-", "-"]
        if row["load"] < 1:
            pairs = (row[kind] for kind in ("puts of new images", "reads of servers"))
            cells = [number(pair[key], 2) for pair in pairs for key in ("median_ms", "p99_ms")]
        rows.append([f"{row['gpus']:,}", f"{row['capacity']:,}", f"{row['load']:.0%}", *cells])
    head = ["GPUs", "metadata requests/s served", "load", "put, median ms", "put, p99", "read, median ms", "read, p99"]
    return table(head, rows)


def bursts_table(results: Results) -> str:
    """Latency of operations that begin together."""
    rows = [
        [row["burst"], f"{row['operations']:,}", f"{row['capacity']:,}", number(row["p99_ms"] / 1e3, 2)]
        for row in results["bursts"]
    ]
    return table(["at the same moment", "operations", "metadata requests/s served", "p99, s"], rows)


def durability_table(results: Results) -> str:
    """Policies of flushing."""
    names = {
        "none": "no fsync",
        "file": "fsync of the file",
        "file_and_folder": "fsync of the file and of the folder (what `put` does)",
    }
    rows = []
    for key, name in names.items():
        row = results["durability"][key]
        rows.append([name, f"{row['median_ms']:.2f}", f"{row['p99_ms']:.2f}"])
    return table(["writing 400 KB", "median, ms", "p99, ms"], rows)


def care_table(results: Results) -> str:
    """Listing, verifying and collecting, measured and carried over."""
    s, care = Scenario(), results["looking_after"]
    total = s.images_total
    core_hours = total * care["verify_picture_ms"] / 1e3 / 3600
    fullest = results["folder_sizes"][-1]
    names_mb = fullest["list_store_mb"]
    rows = [
        [
            "`store ls`, names and sizes",
            f"{care['listed_per_second']:,.0f} files/s",
            f"{total / care['listed_per_second'] / 3600:.1f} h; "
            f"{total * LOOKUP_SECONDS / 3600:.1f} h at a round trip a file",
        ],
        [
            "`store verify`, work of one core",
            f"{care['verify_picture_ms']:.1f} ms a picture",
            f"{core_hours:,.0f} core hours",
        ],
        [
            "`store verify`, memory",
            f"{care['verify_few_mb']:.1f} MB for {care['few_files']:,} files, "
            f"{care['verify_all_mb']:.1f} MB for {care['files']:,}",
            f"{names_mb:.0f} MB: the names of one folder of {fullest['entries']:,}, measured",
        ],
        [
            "`store gc`, half of the files removed",
            f"{care['gc_per_second']:,.0f} files/s",
            f"{total / care['gc_per_second'] / 3600:.1f} h; "
            f"{total * 1.5 * LOOKUP_SECONDS / 3600:.1f} h at a round trip a file and a removal",
        ],
        [
            "`store gc --keep-runs`, memory",
            f"{care['gc_keep_bytes_per_hash']:,.0f} bytes a kept hash",
            f"{total * care['gc_keep_bytes_per_hash'] / 1e9:,.0f} GB if all are kept",
        ],
    ]
    return table(["what", f"measured, {care['files']:,} files", f"at {total:,} files"], rows)


def references_table(results: Results) -> str:
    """What goes through the orchestrator."""
    s, refs = Scenario(), results["references"]
    tokens = s.rollouts * s.tokens
    rows = [
        ["references to the inference servers", "", f"{refs['wire_bytes_per_image']:.0f} bytes", s.shown],
        ["references to the trainers", "", f"{refs['sample_bytes_per_image']:.0f} bytes", s.spans],
        ["the tokens beside them", "", f"{refs['sample_bytes_per_token']:.0f} bytes", tokens],
        ["lists of tokens while a step is packed", "", f"{refs['held_bytes_per_token']:.0f} bytes of memory", tokens],
    ]
    sizes = [refs[key] for key in ("wire_bytes_per_image", "sample_bytes_per_image")]
    sizes += [refs[key] for key in ("sample_bytes_per_token", "held_bytes_per_token")]
    cells = [
        [row[0], row[2], f"{row[3]:,}", f"{number(size * row[3] / 1e6)} MB"]
        for row, size in zip(rows, sizes, strict=True)
    ]
    pictures = s.spans * s.image_bytes
    cells.append(
        [
            "for comparison: the pictures themselves",
            f"{s.image_bytes:,} bytes",
            f"{s.spans:,}",
            f"{number(pictures / 1e6)} MB",
        ]
    )
    seconds = refs["encode_us_per_token"] * tokens / 1e6
    cells.append(
        [
            "encoding the step's batches",
            f"{refs['encode_us_per_token']:.2f} µs a token",
            f"{tokens:,}",
            f"{seconds:.0f} s",
        ]
    )
    return table(["what", "each, measured", "a step", "product"], cells)


def assets_table(results: Results) -> str:
    """What one asset endpoint would have to do."""
    s = Scenario()
    rows = []
    for kind in fetches(results, s):
        rate = kind.operations / s.step_seconds
        rows.append(
            [
                kind.name,
                f"{kind.operations:,.0f}",
                number(rate, 2) if rate < 10 else f"{rate:,.0f}",
                f"{rate * kind.num_bytes / 1e6:,.0f}",
                f"{kind.core_seconds * 1e3:.2g} ms" if kind.core_seconds < 1 else f"{kind.core_seconds:.0f} s",
                number(rate * kind.core_seconds, 2),
            ]
        )
    head = ["what", "fetches a step", "fetches/s", "MB/s", "work of one core for each, measured", "cores busy"]
    return table(head, rows)


def verdict_table(results: Results) -> str:
    """Where it holds, bends and breaks."""
    s, care, refs = Scenario(), results["looking_after"], results["references"]
    kinds = traffic(results, s)
    requests, rate = total_requests(kinds, s), total_bytes(kinds, s)
    roomy_requests = total_requests(traffic(results, s, cache_mib=1024), s)
    entries = entries_per_folder(s.images_total, 256)
    fullest = results["folder_sizes"][-1]
    system = FileSystem(CAPACITIES[0])
    bandwidth = system.data_servers * system.bytes_per_second
    bound, roomy = (1 - miss_share(server_misses(results, AT_THE_REFERENCE, mib)) for mib in (256, 1024))
    gateway = gateway_traffic(results, s)
    polls = lookups(10.0, 60.0)
    *pictures, weights = fetches(results, s)
    picture_rate = sum(kind.operations for kind in pictures) / s.step_seconds
    picture_cores = picture_rate * pictures[0].core_seconds
    weight_rate = weights.operations * weights.num_bytes / s.step_seconds
    weight_cores = weights.operations * weights.core_seconds / s.step_seconds
    writers = results["simultaneous_writers"]
    extra = s.groups * (writers - 1) / s.distinct
    token_bytes = refs["sample_bytes_per_token"] * s.rollouts * s.tokens
    encode = refs["encode_us_per_token"] * s.rollouts * s.tokens / 1e6
    lists, memory = refs["held_bytes_per_token"] * s.rollouts * s.tokens, 64e9
    file, both = (results["durability"][key]["median_ms"] for key in ("file", "file_and_folder"))
    rows = [
        [
            "bandwidth, reads and writes",
            f"{rate / 1e9:.2f} GB/s",
            "holds",
            f"{number(s.gpus * bandwidth / rate, 2)} GPUs at the assumed {bandwidth / 1e9:.0f} GB/s",
            "nothing",
        ],
        [
            "references through the orchestrator",
            f"{refs['sample_bytes_per_image'] * s.spans / 1e6:.0f} MB a step",
            "holds",
            "not before the tokens beside them",
            "nothing",
        ],
        [
            "256 folders, put and read",
            f"{entries:,.0f} entries; put {fullest['put']:.0f} µs against "
            f"{fullest['put_small']:.0f} µs in a small folder",
            "holds",
            f"ext4 with two index levels: {ext4_entries(results) / 1e6:.1f} M entries a folder, "
            f"{ext4_entries(results) * 256 / 1e9:.1f} x 10^9 images",
            "one store a run; two levels above 10^9 images in one store",
        ],
        [
            "fsync of every file and its folder",
            f"{s.distinct / s.step_seconds:.0f} new files/s, {both:.2f} ms each here, "
            f"{both - file:.2f} ms of it for the folder",
            "holds",
            "where two flushes take longer than a rollout can wait: seconds",
            "nothing: puts run in threads",
        ],
        [
            "metadata requests",
            f"{requests:,.0f}/s, nothing cached by the client",
            "bends",
            ", ".join(f"{number(s.gpus * capacity / requests, 2)} GPUs at {capacity:,}/s" for capacity in CAPACITIES),
            f"caches of 1 GiB: {roomy_requests:,.0f}/s; spread the folders over metadata servers",
        ],
        [
            "servers' caches, 256 MiB",
            f"{bound:.0%} hits; the client keeps a group on its server",
            "bends",
            "as soon as the live rollouts of a server have more pictures than fit",
            f"`inference.reader.cache_bytes` of 1 GiB: {roomy:.0%}",
        ],
        [
            "groups putting the same picture at once",
            f"{writers:.0f} of {s.group_size} rollouts wrote it",
            "bends",
            f"{extra:.0%} more writes; more if most pictures are the tasks'",
            "one write at a time per hash in a process",
        ],
        [
            "gateway: history put again",
            f"{gateway.operations:,.0f} puts a step, each reads the whole file: "
            f"{gateway.bytes_per_second(s) / 1e9:.2f} GB/s",
            "bends",
            "grows with the square of the turns",
            "remember in the process which hashes it has put",
        ],
        [
            "tokens through the orchestrator",
            f"{token_bytes / 1e9:.1f} GB a step, {encode:.0f} s to encode, {lists / 1e9:.0f} GB of lists",
            "bends",
            f"{number(s.gpus * memory / lists, 2)} GPUs: the lists fill 64 GB",
            "arrays instead of lists",
        ],
        [
            "`store ls`, `gc`",
            f"{s.images_total * LOOKUP_SECONDS / 3600:.1f} h and more, one request after another",
            "bends",
            f"{3600 / LOOKUP_SECONDS / 1e6:.0f} M files an hour at {LOOKUP_SECONDS * 1e3:.1f} ms a request",
            "one store a run; the 256 folders side by side",
        ],
        [
            "`store verify`",
            f"{s.images_total * care['verify_picture_ms'] / 3.6e6:,.0f} core hours; "
            f"memory of one folder's names, {fullest['list_store_mb']:.0f} MB",
            "bends",
            "hours grow with the files, memory with the largest folder",
            "one store a run; many cores",
        ],
        [
            "batches through files",
            f"{polls * s.training_gpus:,.0f} lookups/s while {s.training_gpus} ranks wait",
            "bends",
            f"{requests / polls:,.0f} ranks ask as much as all images",
            '`transport.type = "zmq"`',
        ],
        [
            "no shared file system at all",
            "a `file://` URL says nothing to another machine",
            "breaks",
            "the second machine",
            "fetch by hash from an asset endpoint (`multimodal.assets`), below",
        ],
        [
            "pictures from one asset endpoint",
            f"{picture_rate:,.0f} fetches/s, {picture_rate * s.image_bytes / 1e9:.2f} GB/s, "
            f"{picture_cores:.0%} of a core",
            "holds",
            f"{number(s.gpus / picture_cores, 2)} GPUs: its one core; "
            f"{number(s.gpus * LINK_BYTES / (picture_rate * s.image_bytes), 2)} GPUs: 10 Gbit/s",
            "nothing; not for steps that begin at the same moment",
        ],
        [
            "weights from one asset endpoint",
            f"{weight_rate / 1e9:.0f} GB/s, {weight_cores:.0f} cores",
            "breaks",
            f"{s.servers / weight_cores:.0f} servers: its one core",
            "weights over a shared file system",
        ],
    ]
    return table(["what", "at the reference", "verdict", "breaks at", "what to do"], rows)


TABLES: Final[dict[str, Callable[[Results], str]]] = {
    "scenario": scenario_table,
    "volume": volume_table,
    "folders": folder_table,
    "calls": calls_table,
    "caches": caches_table,
    "traffic": traffic_table,
    "queueing": queueing_table,
    "bursts": bursts_table,
    "durability": durability_table,
    "care": care_table,
    "references": references_table,
    "assets": assets_table,
    "verdict": verdict_table,
}


def with_tables(page: str, results: Results) -> str:
    """The page with every table made anew.

    Raises:
        ValueError: The page has no place for a table.
    """
    for name, make in TABLES.items():
        begin, end = f"<!-- scaling: {name} -->\n", f"<!-- end of {name} -->\n"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"docs/scaling.md has no {begin.strip()} ... {end.strip()}")
        page = before + begin + make(results) + end + after
    return page


def main() -> None:
    names = sys.argv[1:]
    if names != ["tables"]:
        measure(names or list(SECTIONS))
    PAGE.write_text(with_tables(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
