"""Faults against a real store: writers killed at random points, and flipped bits.

    python -m tests.faults.store_faults --rounds 200 --processes 64 --images 1000

Each round forks writers that put overlapping images and are killed with SIGKILL at a random moment. A put counts as
acknowledged once the writer has said so after it returned. Afterwards no file under a final name may be anything but
what the name says, and every acknowledged image must be there. Then one bit of each of the images is flipped in turn.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import track

from pointillist.images import ImageLimits, ImageStore
from pointillist.images.inventory import list_store, verify_entry
from tests.helpers.pictures import encoded, picture

LIMITS = ImageLimits()


def write_until_killed(root: Path, images: list[bytes], said: Path, seed: int) -> None:
    """Puts images in an order of its own, and says which are done."""
    store = ImageStore(root, LIMITS)
    order = list(range(len(images)))
    random.Random(seed).shuffle(order)
    with said.open("ab", buffering=0) as file:
        for index in order:
            file.write(store.put(images[index]).sha256.encode() + b"\n")


def kill_round(root: Path, images: list[bytes], said: Path, processes: int, seed: int) -> None:
    """One round: start, wait a random moment, kill all."""
    children = []
    for number in range(processes):
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(root, images, said, seed * 1000 + number)
            finally:
                os._exit(0)
        children.append(child)
    time.sleep(random.Random(seed).uniform(0.0, 0.3))
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def count_damage(root: Path, said: Path) -> tuple[int, int]:
    """Half-written files under final names, and acknowledged images that are not there."""
    present, damaged = set(), 0
    for entry in list_store(root):
        if entry.sha256 is not None:
            present.add(entry.sha256)
            damaged += hashlib.sha256(entry.path.read_bytes()).hexdigest() != entry.sha256
    acknowledged = {line for line in said.read_text().splitlines() if len(line) == 64} if said.exists() else set()
    return damaged, len(acknowledged - present)


def count_found_flips(root: Path, images: list[bytes]) -> int:
    """Flips one random bit of each image in turn; how many of these `store verify` finds."""
    store, chance = ImageStore(root, LIMITS), random.Random(0)
    for image in images:
        store.put(image)
    found = 0
    for entry in list_store(root):
        if entry.sha256 is None:
            continue
        data = bytearray(entry.path.read_bytes())
        original = bytes(data)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        entry.path.write_bytes(data)
        found += verify_entry(entry, LIMITS).condition == "corrupt"
        entry.path.write_bytes(original)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    images = [encoded(picture(24, 24, seed)) for seed in range(args.images)]
    damaged = lost = temporary = acknowledged = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in track(range(args.rounds), "killing writers"):
            # A store of its own every tenth round, so that most rounds have something left to write.
            root = Path(folder) / f"store-{number // 10}"
            said = Path(folder) / f"said-{number // 10}"
            kill_round(root, images, said, args.processes, number)
            round_damaged, round_lost = count_damage(root, said)
            damaged, lost = damaged + round_damaged, lost + round_lost
        for root in sorted(Path(folder).glob("store-*")):
            temporary += sum(entry.condition == "half-written" for entry in list_store(root))
        for said in Path(folder).glob("said-*"):
            acknowledged += said.read_text().count("\n")
        found = count_found_flips(Path(folder) / "flips", images)
    print(f"{args.rounds} rounds of {args.processes} writers killed: {acknowledged:,} puts acknowledged")
    print(f"half-written files under a final name: {damaged}; acknowledged puts lost: {lost}")
    print(f"temporary files left for `store gc`: {temporary}")
    print(f"flipped bits found: {found} of {len(images)}")
    return int(bool(damaged or lost or found != len(images)))


if __name__ == "__main__":
    sys.exit(main())
