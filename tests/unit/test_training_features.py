"""Features are computed in order, by engines that work in parallel, once for each image and engine."""

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from kubegraft import processes
from kubegraft.errors import Interrupted
from kubegraft.training import features
from kubegraft.training.distribution import make_strategy
from kubegraft.training.features import extract_rows, in_order
from kubegraft.training.sources import FeatureSource

NUM_IMAGES, BATCH_SIZE = 50, 4


@dataclass
class Means:
    """An engine that takes its time: the mean colour of each image."""

    digest: str = "a" * 64
    name: str = "means"
    batch_size: int = BATCH_SIZE
    num_workers: int = 3
    stop_after: int = 1000
    seen: list[int] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forward(self, images):
        time.sleep(float(images[0, 0, 0, 0]) % 3 / 500)  # later batches are ready before earlier ones
        with self.lock:
            self.shapes.append(images.shape)
            self.seen.extend(images[:, 0, 0, 0].astype(int))
            if len(self.seen) >= self.stop_after:
                processes._stop.set()
        return images.mean((1, 2))


@pytest.fixture(autouse=True)
def _not_stopped():
    yield
    processes._stop.clear()


@pytest.fixture
def source():
    images = np.broadcast_to(
        np.arange(NUM_IMAGES, dtype=np.float32)[:, None, None, None], (NUM_IMAGES, 2, 2, 3)
    )
    return FeatureSource(np.ascontiguousarray(images), np.zeros(NUM_IMAGES, np.int32))


def extract(engine, source, directory):
    return extract_rows(make_strategy(), engine, source, row_length=3, path=directory / "train.npy")


def test_rows_come_in_the_order_of_the_images(source, tmp_path):
    features = extract(Means(), source, tmp_path)
    np.testing.assert_array_equal(features[:, 0], np.arange(NUM_IMAGES))


def test_an_interrupted_extraction_goes_on_where_it_stopped(source, tmp_path):
    with pytest.raises(Interrupted, match="asked to stop"):
        extract(Means(stop_after=20), source, tmp_path)
    processes._stop.clear()
    rest = Means()
    features = extract(rest, source, tmp_path)
    np.testing.assert_array_equal(features[:, 0], np.arange(NUM_IMAGES))
    assert len(rest.seen) < NUM_IMAGES
    again = Means()
    np.testing.assert_array_equal(extract(again, source, tmp_path), features)
    assert again.seen == []


def test_rows_of_two_engines_are_never_mixed(source, tmp_path):
    with pytest.raises(Interrupted):
        extract(Means(stop_after=20), source, tmp_path)
    processes._stop.clear()
    other = Means(digest="b" * 64)
    extract(other, source, tmp_path)
    assert set(other.seen) == set(range(NUM_IMAGES))


def test_few_batches_are_held_at_a_time():
    engine, made = Means(num_workers=2), []

    def batches():
        for number in range(12):
            made.append(number)
            yield np.full((1, 2, 2, 3), number, np.float32)

    for number, rows in enumerate(in_order(engine.forward, batches(), engine.num_workers)):
        assert rows[0, 0] == number
        assert len(made) <= number + engine.num_workers + 2


@pytest.mark.parametrize("num_processors", [1, 3, 64])
def test_rows_do_not_depend_on_who_makes_the_inputs(source, tmp_path, monkeypatch, num_processors):
    monkeypatch.setattr(features, "usable_processors", lambda: num_processors)
    engine = Means()
    rows = extract(engine, source, tmp_path)
    np.testing.assert_array_equal(rows[:, 0], np.arange(NUM_IMAGES))
    assert set(engine.shapes) == {(BATCH_SIZE, 2, 2, 3)}  # Keras's last bits depend on the shape


def test_a_failure_of_the_engine_is_the_callers(source, tmp_path):
    class Broken(Means):
        def forward(self, images):
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        extract(Broken(), source, tmp_path)
