"""A short run of the fault script with the other tests; `make faults` is the long one."""

from pathlib import Path

from tests.faults.store_faults import count_damage, count_found_flips, kill_round
from tests.helpers.pictures import encoded, picture


def test_killed_writers_leave_nothing_half_written(tmp_path: Path) -> None:
    images = [encoded(picture(24, 24, seed)) for seed in range(100)]
    root, said = tmp_path / "store", tmp_path / "said"
    for number in range(4):
        kill_round(root, images, said, processes=8, seed=number)
        assert count_damage(root, said) == (0, 0)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    images = [encoded(picture(24, 24, seed)) for seed in range(50)]
    assert count_found_flips(tmp_path, images) == len(images)
