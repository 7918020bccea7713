"""A frozen pass is answered alike by its engine and by Keras; what can't be is left to Keras."""

import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from kubegraft.errors import ConfigError
from kubegraft.modeling.engines import (
    IMAGES_AT_ONCE,
    TOLERANCE,
    FrozenGraph,
    choice,
    choose_engine,
    recallable,
    relative_difference,
)
from kubegraft.modeling.engines import verdicts as verdicts_module
from kubegraft.modeling.engines.litert import LiteRtForward, convert
from kubegraft.modeling.engines.verdicts import Verdict, Verdicts


def pictures(number, size, seed=0):
    """Return images with structure, as photographs have, and some noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(0, 255, (number, 4, 4, 3))
    smooth = tf.image.resize(coarse, (size, size)).numpy()
    return np.clip(smooth + generator.normal(0, 10, smooth.shape), 0, 255).astype(np.float32)


@pytest.fixture(scope="module")
def small():
    """Return a small network as a function, and images for it."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(8, 3, strides=2, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(6),
            layers.GlobalAveragePooling2D(),
        ]
    )
    return (lambda images: model(images, training=False)), pictures(5, 16)


def test_rows_depend_neither_on_threads_nor_on_the_batch(small):
    forward, images = small
    flatbuffer = convert(FrozenGraph(forward, 16))
    one, two = (LiteRtForward(flatbuffer, 16, num_threads=threads) for threads in (1, 2))
    together = one.forward(images)
    np.testing.assert_array_equal(two.forward(images), together)
    for index in range(len(images)):
        np.testing.assert_array_equal(two.forward(images[index : index + 1])[0], together[index])


def test_a_small_group_of_features_must_be_right_beside_a_large_one(small, tmp_path, monkeypatch):
    forward, images = small

    def scaled(given):
        rows = forward(given)
        return tf.concat([rows, 1e6 * rows], 1)

    # Wrong by a hundredth in the first half, which is nothing beside the other.
    right = LiteRtForward.forward
    monkeypatch.setattr(
        LiteRtForward,
        "forward",
        lambda self, given: right(self, given) * np.repeat([1.01, 1.0], 8).astype("f4"),
    )
    for groups, expected in (((8, 8), "keras"), ((), "litert")):
        verdicts = Verdicts(tmp_path / expected)
        chosen = choose_engine(scaled, lambda: images, 16, groups=groups, engine="litert", verdicts=verdicts)
        assert chosen.name == expected


def test_more_threads_than_workers_get_their_own_rows(small):
    forward, images = small
    engine = LiteRtForward(convert(FrozenGraph(forward, 16)), 16, num_threads=2)
    expected, found = engine.forward(images), {}

    def call(number):
        for _ in range(20):
            found[number] = engine.forward(images[number : number + 1])

    threads = [threading.Thread(target=call, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, rows in found.items():
        np.testing.assert_array_equal(rows[0], expected[number])


def test_a_verdict_is_found_again_and_gives_the_same_bits(small, tmp_path, capfd):
    forward, images = small
    first = choose_engine(forward, lambda: images, 16, verdicts=Verdicts(tmp_path))
    again = choose_engine(forward, lambda: images, 16, verdicts=Verdicts(tmp_path))
    assert (again.name, again.digest) == (first.name, first.digest)
    np.testing.assert_array_equal(again.forward(images), first.forward(images))
    assert capfd.readouterr().err.count("engine: ") == 2


def test_who_comes_while_an_engine_is_made_waits_and_finds_it(small, tmp_path, monkeypatch):
    forward, images = small
    converted, made, convert_ = [], [], choice.convert

    def slowly(graph):
        converted.append(graph)
        time.sleep(0.5)
        return convert_(graph)

    monkeypatch.setattr(choice, "convert", slowly)
    threads = [
        threading.Thread(
            target=lambda: made.append(
                choose_engine(forward, lambda: images, 16, verdicts=Verdicts(tmp_path))
            )
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(converted) == 1
    assert len({engine.digest for engine in made}) == 1


def test_a_lock_that_nobody_gives_back_is_waited_for_a_while_and_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(verdicts_module, "_SILENT_SECONDS", -1.0)
    monkeypatch.setattr(verdicts_module, "_LONGEST_WAIT_SECONDS", 0.3)
    with Verdicts(tmp_path).deciding("key"), Verdicts(tmp_path).deciding("key"):
        assert capfd.readouterr().err.count("another process makes this very engine") == 1


def test_a_graph_that_calls_others_is_converted_too(small, tmp_path):
    forward, images = small
    called = tf.function(forward, autograph=False)
    rows = LiteRtForward(convert(FrozenGraph(lambda given: called(given), 16)), 16).forward(images)
    np.testing.assert_array_equal(rows, LiteRtForward(convert(FrozenGraph(forward, 16)), 16).forward(images))


def test_a_variable_that_is_not_just_read_is_left_to_the_slower_way(small):
    _, images = small
    table = tf.Variable(np.arange(12, dtype=np.float32).reshape(4, 3))

    def forward(given):
        place = tf.cast(tf.reduce_mean(given, (1, 2, 3)), tf.int32) % 4
        return tf.gather(table, place) + tf.reduce_mean(given, (1, 2))

    expected = forward(tf.constant(images)).numpy()
    rows = LiteRtForward(convert(FrozenGraph(forward, 16)), 16).forward(images)
    np.testing.assert_allclose(rows, expected, rtol=1e-5)


def test_a_captured_tensor_is_converted_with_its_value(small):
    _, images = small
    scale = (
        np.random.default_rng(0).uniform(1, 2, (16, 16, 3)).astype(np.float32)
    )  # small ones are no captures
    captured = tf.constant(scale)
    rows = LiteRtForward(convert(FrozenGraph(lambda given: tf.reduce_mean(given * captured, (1, 2)), 16)), 16)
    np.testing.assert_allclose(rows.forward(images), (images * scale).mean((1, 2)), rtol=1e-4)


@pytest.mark.parametrize("num_workers", range(1, 9))
def test_in_a_trial_every_worker_has_as_many_images_as_it_takes_at_once(num_workers):
    class Engine:
        def __init__(self, num_workers):
            self.num_workers, self.sizes = num_workers, []

        def forward(self, images):
            self.sizes.append(len(images))
            return images

    litert, keras = Engine(num_workers), Engine(1)
    choice._ratio(litert, keras, np.zeros((8, 2, 2, 3), np.float32))
    assert set(litert.sizes) == {IMAGES_AT_ONCE}
    assert set(keras.sizes) == {num_workers * IMAGES_AT_ONCE}


def test_a_damaged_flatbuffer_is_not_used(tmp_path):
    verdicts = Verdicts(tmp_path)
    verdicts.keep("key", Verdict("litert", "fast"), b"a flatbuffer")
    assert verdicts.find("key")[1] == b"a flatbuffer"
    (tmp_path / "key.tflite").write_bytes(b"half of it")
    assert verdicts.find("key") is None


def test_verdicts_that_cannot_be_kept_cost_nothing_else(small, tmp_path):
    (tmp_path / "file").write_text("")
    forward, images = small
    assert (
        choose_engine(forward, lambda: images, 16, verdicts=Verdicts(tmp_path / "file" / "below"))
        .forward(images)
        .any()
    )


def test_what_the_engine_cannot_convert_is_left_to_keras_and_said(tmp_path, capfd):
    def forward(images):
        return tf.py_function(lambda pixels: tf.reduce_mean(pixels, (1, 2)), [images], tf.float32)

    images = pictures(3, 16)
    engine = choose_engine(forward, lambda: images, 16, verdicts=Verdicts(tmp_path))
    assert engine.name == "keras"
    np.testing.assert_allclose(engine.forward(images), images.mean((1, 2)), rtol=1e-5)
    assert "LiteRT can't run it" in capfd.readouterr().err


def test_what_the_engine_finds_it_cannot_run_is_left_to_keras(small, tmp_path, capfd, monkeypatch):
    forward, images = small

    def fails(self, images):
        raise RuntimeError("an operation failed to invoke")

    monkeypatch.setattr(LiteRtForward, "forward", fails)
    assert choose_engine(forward, lambda: images, 16, verdicts=Verdicts(tmp_path)).name == "keras"
    assert "LiteRT can't run it: RuntimeError: an operation failed" in capfd.readouterr().err


def test_rows_are_recalled_of_the_engine_that_this_machine_takes(small, tmp_path, monkeypatch):
    forward, images = small
    monkeypatch.delenv("KUBEGRAFT_ENGINE", raising=False)
    verdicts = Verdicts(tmp_path)
    assert recallable("a graph", verdicts) == ("litert", "keras")
    taken = choose_engine(forward, lambda: images, 16, identity="a graph", verdicts=verdicts).name
    assert recallable("a graph", verdicts) == (taken,)
    assert recallable("another", verdicts) == ("litert", "keras")
    monkeypatch.setenv("KUBEGRAFT_ENGINE", "keras")
    assert recallable("a graph", verdicts) == ("keras",)


def test_an_engine_that_differs_is_not_used(small, tmp_path, capfd, monkeypatch):
    forward, images = small
    wrong = FrozenGraph(lambda pixels: 1.001 * forward(pixels), 16)
    monkeypatch.setattr(choice, "convert", lambda _: convert(wrong))
    engine = choose_engine(forward, lambda: images, 16, verdicts=Verdicts(tmp_path))
    assert engine.name == "keras"
    assert "LiteRT differs from Keras by" in capfd.readouterr().err


def test_keras_can_be_asked_for(small, tmp_path, monkeypatch):
    forward, images = small
    monkeypatch.setenv("KUBEGRAFT_ENGINE", "keras")
    engine = choose_engine(forward, lambda: images, 16, verdicts=Verdicts(tmp_path))
    assert engine.name == "keras"
    assert relative_difference(engine.forward(images), forward(images).numpy()) <= TOLERANCE
    monkeypatch.setenv("KUBEGRAFT_ENGINE", "litter")
    with pytest.raises(ConfigError, match="Did you mean 'litert'"):
        choose_engine(forward, lambda: images, 16, verdicts=Verdicts(tmp_path))


def test_other_weights_are_another_graph(small):
    def graph(factor):
        weight = tf.Variable([factor, 1.0, 1.0])
        return FrozenGraph(lambda images: weight * tf.reduce_mean(images, (1, 2)), 16)

    assert graph(1.0).digest == graph(1.0).digest
    assert graph(1.0).digest != graph(2.0).digest


@pytest.mark.parametrize(
    ("rows", "expected", "difference"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], 0.0),
        ([[1.0, 2.0]], [[1.0, 4.0]], 0.5),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0),
        ([[float("nan"), 1.0]], [[0.0, 1.0]], float("inf")),
        ([[0.0, 1.0]], [[float("inf"), 1.0]], float("inf")),
        ([[1e-3, 1.0]], [[0.0, 1.0]], 1e-3),
    ],
)
def test_the_difference_is_a_share_of_the_largest_feature(rows, expected, difference):
    found = relative_difference(np.array(rows, np.float32), np.array(expected, np.float32))
    assert found == pytest.approx(difference)
