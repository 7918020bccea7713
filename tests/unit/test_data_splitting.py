import hashlib

import pytest

from kubegraft.data.splitting import carve

FRACTIONS = {"test": 0.1, "validation": 0.15}


def digests(count, salt=""):
    return [hashlib.sha256(f"{salt}{number}".encode()).hexdigest() for number in range(count)]


def counts(split_of):
    return {split: list(split_of.values()).count(split) for split in ("train", "validation", "test")}


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [
        (1, (1, 0, 0)),
        (2, (2, 0, 0)),
        (3, (1, 1, 1)),
        (10, (7, 2, 1)),
        (20, (15, 3, 2)),
        (1000, (750, 150, 100)),
    ],
)
def test_counts_are_exact(num_images, expected):
    assert tuple(counts(carve(digests(num_images), FRACTIONS, seed=0)).values()) == expected


def test_large_fractions_leave_train_an_image():
    assert counts(carve(digests(4), {"test": 0.5, "validation": 0.5}, seed=0))["train"] == 1
    assert counts(carve(digests(1), {"test": 0.5, "validation": 0.5}, seed=0))["train"] == 1


def test_the_split_depends_on_seed_and_bytes_alone():
    images = digests(50)
    assert carve(images, FRACTIONS, seed=3) == carve(reversed(images), FRACTIONS, seed=3)
    assert carve(images, FRACTIONS, seed=3) != carve(images, FRACTIONS, seed=4)


def test_equal_images_count_once_and_stay_together():
    images = digests(10)
    assert carve(images * 3, FRACTIONS, seed=0) == carve(images, FRACTIONS, seed=0)


def test_without_fractions_everything_is_train():
    assert set(carve(digests(9), {}, seed=0).values()) == {"train"}
