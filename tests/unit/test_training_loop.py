import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from kubegraft.errors import ConfigError, DivergenceError, Interrupted
from kubegraft.training import loop, steps, xla_on_cpu
from kubegraft.training.distribution import divisible_batch_size, make_strategy
from kubegraft.training.history import History, surely_better
from kubegraft.training.loop import LoopConfig, train
from kubegraft.training.sources import FeatureSource
from kubegraft.training.starvation import WatchedInput
from kubegraft.training.trainables import HeadOnFeatures, first_kept

NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES, BATCH_SIZE = 43, 12, 3, 16


def examples() -> FeatureSource:
    random = np.random.default_rng(0)
    labels = random.integers(0, NUM_CLASSES, NUM_EXAMPLES).astype(np.int32)
    features = random.standard_normal((NUM_EXAMPLES, NUM_FEATURES)).astype(np.float32)
    features[:, 0] += 2 * labels
    return FeatureSource(features, labels)


def head(plain: bool = False) -> tuple[HeadOnFeatures, list]:
    keras.utils.set_random_seed(4)
    layers = [
        keras.layers.Dense(8, activation="relu"),
        *([] if plain else [keras.layers.BatchNormalization(synchronized=True)]),
        keras.layers.Dropout(0.0 if plain else 0.3),
        keras.layers.Dense(NUM_CLASSES),
    ]
    model = keras.Sequential(layers)
    model.build((None, NUM_FEATURES))
    return HeadOnFeatures(SimpleNamespace(head_layers=layers)), model


def config(**options) -> LoopConfig:
    defaults = {
        "phase": "train_head",
        "num_classes": NUM_CLASSES,
        "batch_size": BATCH_SIZE,
        "num_epochs": 3,
        "learning_rate": 0.02,
        "warmup_fraction": 0.2,
        "weight_decay": 0.1,
        "label_smoothing": 0.1,
        "gradient_clip_norm": 0.3,
        "patience": 50,
        "time_budget_seconds": 0,
        "checkpoint_interval_seconds": 0,
        "seed": 5,
        "mixup_alpha": 0.2,
        "class_weights": np.array([1, 2, 0.5], np.float32),
        "average_decay": 0.5,
    }
    return LoopConfig(**defaults | options)


def run(path: Path, devices=("CPU:0",), plain=False, **options):
    strategy = make_strategy(devices)
    with strategy.scope():
        trainable, model = head(plain)
    history = train(strategy, trainable, (examples(), examples()), config(**options), path)
    return history, [variable.numpy() for variable in model.variables]


def test_the_same_run_twice_gives_the_same_weights(tmp_path):
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    for one, other in zip(first[1], second[1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_learns(tmp_path):
    history, _ = run(tmp_path / "c", num_epochs=25, mixup_alpha=0.0)
    assert history.best["validation_accuracy"] > history.start["validation_accuracy"] + 0.2
    assert history.best["validation_accuracy"] > 0.7


@pytest.mark.parametrize("resident_bytes", [0, 512 << 20], ids=["streamed", "held"])
@pytest.mark.parametrize("calls_before_stop", [1, 2, 4])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, calls_before_stop, resident_bytes):
    monkeypatch.setattr(steps, "RESIDENT_BYTES", resident_bytes)
    undisturbed, expected = run(tmp_path / "undisturbed")
    remaining = iter([False] * (calls_before_stop - 1) + [True])
    monkeypatch.setattr(loop, "stop_requested", lambda: next(remaining, False))
    with pytest.raises(Interrupted, match="saved a checkpoint"):
        run(tmp_path / "stopped")
    history, weights = run(tmp_path / "stopped")
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [e["train_loss"] for e in history.epochs] == [e["train_loss"] for e in undisturbed.epochs]


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.2])
def test_features_that_are_held_train_like_those_that_are_streamed(tmp_path, monkeypatch, mixup_alpha):
    held, weights = run(tmp_path / "held", mixup_alpha=mixup_alpha)
    monkeypatch.setattr(steps, "RESIDENT_BYTES", 0)
    streamed, expected = run(tmp_path / "streamed", mixup_alpha=mixup_alpha)
    for one, other in zip(held.epochs, streamed.epochs, strict=True):
        for name in one.keys() - {"seconds"}:
            assert one[name] == pytest.approx(other[name], abs=1e-5), name
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.fixture
def compiled(monkeypatch):
    """The options of everything that is compiled while a test runs."""
    found, function = [], steps.tf.function
    monkeypatch.setattr(
        steps.tf, "function", lambda *args, **options: found.append(options) or function(*args, **options)
    )
    return found


@pytest.mark.parametrize("plain", [False, True])
def test_steps_that_xla_compiles_train_alike(tmp_path, monkeypatch, compiled, plain):
    monkeypatch.setenv("KUBEGRAFT_XLA", "off")
    usual, expected = run(tmp_path / "usual", plain=plain)
    assert not any(options.get("jit_compile") for options in compiled)
    monkeypatch.setenv("KUBEGRAFT_XLA", "on")
    history, weights = run(tmp_path / "xla", plain=plain)
    assert any(options.get("jit_compile") for options in compiled)
    for one, other in zip(history.epochs, usual.epochs, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-4)
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("wanted", "gpu", "ours"), [("on", False, True), ("on", True, False), ("off", False, False)]
)
def test_a_large_batch_takes_the_forms_that_xla_is_fast_at_on_a_cpu(tmp_path, monkeypatch, wanted, gpu, ours):
    monkeypatch.setenv("KUBEGRAFT_XLA", "off")
    _, expected = run(tmp_path / "usual", batch_size=64)
    products, product = [], xla_on_cpu._product
    monkeypatch.setattr(xla_on_cpu, "_product", lambda *args: products.append(args) or product(*args))
    monkeypatch.setattr(steps, "has_gpu", lambda: gpu)
    monkeypatch.setenv("KUBEGRAFT_XLA", wanted)
    _, weights = run(tmp_path / "other", batch_size=64)
    assert bool(products) is ours
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_head_on_features_is_compiled_by_xla_on_a_cpu(tmp_path, monkeypatch, compiled, gpu):
    monkeypatch.delenv("KUBEGRAFT_XLA", raising=False)
    monkeypatch.setattr(loop, "has_gpu", lambda: gpu)
    run(tmp_path / "one")
    assert any(options.get("jit_compile") for options in compiled) is not gpu


def test_xla_is_on_or_off(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBEGRAFT_XLA", "ja")
    with pytest.raises(ConfigError, match="KUBEGRAFT_XLA='ja'"):
        run(tmp_path / "neither")


def masks(rate: float, places: np.ndarray, width: int, steps: int, jit_compile: bool = False) -> np.ndarray:
    """What dropout keeps, `bool[steps, places, width]`."""
    layer = HeadOnFeatures(SimpleNamespace(head_layers=[keras.layers.Dropout(rate)]))
    dropped = tf.function(layer.train_logits, jit_compile=jit_compile)
    ones, position = tf.ones((len(places), width)), tf.constant(places, tf.int32)
    outputs = np.stack([dropped(ones, position, tf.constant([3, step])).numpy() for step in range(steps)])
    assert set(np.unique(outputs)) <= {np.float32(0), np.float32(1) / np.float32(1 - rate)}
    return outputs > 0


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_dropout_keeps_as_many_as_it_says_wherever_one_looks(rate):
    kept = masks(rate, np.arange(64), 48, 300)
    deviation = np.sqrt(rate * (1 - rate))
    for axes in [(0, 1, 2), (0, 1), (0, 2), (1, 2), (0,)]:
        share = kept.mean(axes)
        expected = deviation / np.sqrt(kept.size / share.size)
        assert np.abs(share - (1 - rate)).max() < 5.5 * expected, axes
        if share.size > 40:  # nor are they more equal than chance makes them
            assert share.std() == pytest.approx(expected, rel=0.3), axes


def test_masks_of_steps_places_and_units_have_nothing_in_common():
    kept = (masks(0.3, np.arange(64), 48, 300) - 0.7) / np.sqrt(0.21)
    for axis in range(3):
        rows = np.moveaxis(kept, axis, 0).reshape(kept.shape[axis], -1)
        correlations = rows @ rows.T / np.sqrt(rows.shape[1])
        others = correlations[~np.eye(len(rows), dtype=bool)]
        assert np.abs(others).max() < 5.5
        assert others.std() == pytest.approx(1, rel=0.1)


def test_a_mask_is_a_matter_of_the_place_whoever_computes_it():
    whole = masks(0.3, np.arange(64), 48, 3)
    np.testing.assert_array_equal(masks(0.3, np.arange(40, 50), 48, 3), whole[:, 40:50])
    np.testing.assert_array_equal(masks(0.3, np.arange(64), 48, 3, jit_compile=True), whole)


def test_masks_of_steps_whose_first_keys_are_near_have_nothing_in_common_either(monkeypatch):
    keys = iter([[7, 1], [8, 2]])
    monkeypatch.setattr(tf.random, "stateless_uniform", lambda *_, **__: tf.constant(next(keys), tf.uint32))
    one, other = (masks(0.5, np.arange(64), 48, 1)[0].ravel() * 2.0 - 1 for _ in range(2))
    for shift in range(3):
        assert abs((one[shift:] * other[: other.size - shift]).sum()) < 5 * np.sqrt(one.size), shift


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.65, 0.9])
def test_a_mask_drops_a_share_of_all_numbers(rate):
    first = first_kept(rate)
    assert (first - 1) / 2**32 < rate <= first / 2**32


def test_a_device_that_waits_for_its_input_is_told_once(capfd):
    def batches(seconds):
        for number in range(30):
            time.sleep(seconds)
            yield number

    slow, fast = WatchedInput(), WatchedInput()
    for _ in range(2):
        assert list(slow.watch(batches(0.002))) == list(range(30))
        for _ in fast.watch(batches(0)):
            time.sleep(0.002)
    assert slow.waited_share > 0.9
    assert fast.waited_share < 0.2
    assert capfd.readouterr().err.count("input: starves the device") == 1


def test_a_finished_run_is_not_trained_again(tmp_path):
    _, expected = run(tmp_path / "c")
    modified = (tmp_path / "c").stat().st_mtime_ns
    _, weights = run(tmp_path / "c")
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (tmp_path / "c").stat().st_mtime_ns == modified


def test_the_start_is_kept_if_no_epoch_beats_it(tmp_path):
    strategy = make_strategy(["CPU:0"])
    with strategy.scope():
        trainable, model = head()
    source = examples()
    train(strategy, trainable, (source, source), config(num_epochs=30, mixup_alpha=0.0), tmp_path / "good")
    before = [variable.numpy() for variable in model.variables]
    shuffled = FeatureSource(source.features, np.roll(source.labels, 1))  # nothing to learn but harm
    history = train(strategy, trainable, (shuffled, source), config(learning_rate=1.0), tmp_path / "harm")
    assert history.best_epoch == -1
    assert history.best == history.start
    for variable, array in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), array)


@pytest.mark.parametrize(("smoothing", "best"), [(0.0, -1), (0.1, 1)])
def test_an_epoch_that_may_be_luck_does_not_replace_the_start(tmp_path, monkeypatch, smoothing, best):
    # Epoch by epoch one image more is right, at a higher loss each time.
    results = iter(range(100))

    def validate(_self):
        number = next(results)
        accuracy = (NUM_EXAMPLES - 20 + min(number, 2)) / NUM_EXAMPLES
        return {"validation_accuracy": accuracy, "validation_loss": 0.1 + 0.1 * number}

    monkeypatch.setattr(loop._Run, "_validate", validate)
    history, _ = run(tmp_path / "c", num_epochs=9, patience=3, label_smoothing=smoothing, mixup_alpha=0.0)
    assert history.best_epoch == best
    # Patience counts from the highest accuracy, sure or not.
    assert (len(history.epochs), history.highest_epoch) == (5, 1)


def test_the_highest_epoch_is_the_first_of_the_best():
    results = [{"validation_accuracy": each, "validation_loss": 1.0} for each in (0.5, 0.4, 0.6, 0.6)]
    assert History(results[0], results[1:]).highest_epoch == 1
    assert History(results[0], results[1:2]).highest_epoch == -1
    assert History(results[0]).highest_epoch == -1


@pytest.mark.parametrize(
    ("right", "loss", "expected"),
    [
        (182, 0.1, False),  # the start itself
        (182, 0.09, True),
        (183, 0.09, True),
        (183, 0.1, True),
        (183, 0.11, False),  # one image more of 184 is luck
        (181, 0.01, False),
        (180, 0.2, False),
        (183, float("nan"), False),
    ],
)
def test_what_replaces_the_start_is_no_luck(right, loss, expected):
    start = {"validation_accuracy": 182 / 184, "validation_loss": 0.1}
    result = {"validation_accuracy": right / 184, "validation_loss": loss}
    assert surely_better(result, start, 184) is expected


@pytest.mark.parametrize(("right", "expected"), [(165, False), (170, True), (184, True)])
def test_a_clear_gain_replaces_the_start_at_any_loss(right, expected):
    # 22 mistakes: 7 fewer are more than the root of 22 + 15; 3 fewer are not.
    start = {"validation_accuracy": 162 / 184, "validation_loss": 0.1}
    result = {"validation_accuracy": right / 184, "validation_loss": 0.3}
    assert surely_better(result, start, 184) is expected


def test_what_is_kept_are_the_averaged_weights_that_were_validated(tmp_path):
    strategy = make_strategy(["CPU:0"])
    with strategy.scope():
        trainable, _ = head(plain=True)
    history = train(strategy, trainable, (examples(), examples()), config(), tmp_path / "last.ckpt")
    logits = trainable.logits(examples().features).numpy()
    assert history.best_epoch >= 0
    accuracy = (logits.argmax(1) == examples().labels).mean()
    np.testing.assert_allclose(accuracy, history.best["validation_accuracy"], atol=1e-6)
    plain, _ = run(tmp_path / "plain.ckpt", plain=True, average_decay=0.0)
    assert plain.start == history.start
    assert plain.epochs[0]["validation_loss"] != history.epochs[0]["validation_loss"]


def test_rows_are_made_outside_of_the_time_that_a_step_may_take(tmp_path, monkeypatch):
    """A frozen pass over many images takes hours, and a worker's step a minute at most."""
    events = []

    class Rows(FeatureSource):
        def prepare(self):
            events.append("prepare")

        def batch(self, batches, step, columns=slice(None)):
            return tf.constant(self.features[batches.index[step, columns]])

    def watch(self, calls):
        events.append("watch")
        return calls

    monkeypatch.setattr(loop.Pace, "watch", watch)
    monkeypatch.setattr(steps, "RESIDENT_BYTES", 0)
    strategy = make_strategy(["CPU:0"])
    with strategy.scope():
        trainable, _ = head()
    source = Rows(examples().features, examples().labels)
    train(
        strategy, trainable, (source, examples()), config(num_epochs=2, mixup_alpha=0.0), tmp_path / "a.ckpt"
    )
    assert events == ["prepare", "watch"] * 2


def test_training_stops_when_nothing_improves(tmp_path):
    history, _ = run(tmp_path / "c", num_epochs=50, learning_rate=1e-9, patience=2, warmup_fraction=0.0)
    assert len(history.epochs) < 50
    assert "no better validation result in 2 epochs" in history.stopped


def test_a_time_budget_ends_training_within_an_epoch(tmp_path):
    history, _ = run(tmp_path / "c", num_epochs=10_000, time_budget_seconds=0.5)
    assert "time budget" in history.stopped
    assert len(history.epochs) < 10_000


def test_a_loss_that_is_no_number_is_a_clear_error(tmp_path):
    source = examples()
    source.features[5] = np.nan
    strategy = make_strategy(["CPU:0"])
    with strategy.scope():
        trainable, _ = head()
    with pytest.raises(DivergenceError, match=r"epoch \d, step \d.*Lower `learning_rate`"):
        train(strategy, trainable, (source, source), config(), tmp_path / "c")


def test_the_rate_rises_then_falls(tmp_path):
    rates = [epoch["learning_rate"] for epoch in run(tmp_path / "c", num_epochs=8)[0].epochs]
    assert rates[-1] < 1e-6 < max(rates) <= 0.02
    assert rates[1:] == sorted(rates[1:], reverse=True)


@pytest.mark.parametrize(
    ("batch_size", "replicas", "expected"), [(32, 1, 32), (32, 3, 33), (1, 8, 8), (30, 4, 32)]
)
def test_a_batch_divides_evenly(batch_size, replicas, expected):
    assert divisible_batch_size(batch_size, replicas) == expected


TWO_DEVICES = """
import json, sys
from pathlib import Path
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, {tests!r})
from test_training_loop import run
history, _ = run(Path(sys.argv[1]) / "two", devices=("CPU:0", "CPU:1"))
print("HISTORY", json.dumps([history.start, *history.epochs]))
"""


def test_two_devices_see_the_losses_of_one(tmp_path):
    """With an uneven last batch, clipping, dropout, batch norm, mixup and class weights."""
    script = TWO_DEVICES.format(tests=str(Path(__file__).parent))
    output = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    line = next(line for line in output.splitlines() if line.startswith("HISTORY"))
    two = json.loads(line.removeprefix("HISTORY"))
    history, _ = run(tmp_path / "one")
    one = [history.start, *history.epochs]
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"seconds"}:
            assert a[name] == pytest.approx(b[name], abs=1e-5), name


def test_a_checkpoint_of_another_batch_size_is_not_gone_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "stop_requested", lambda: True)
    with pytest.raises(Interrupted):
        run(tmp_path / "c")
    monkeypatch.undo()
    found = loop.load_checkpoint(tmp_path / "c")
    loop.save_checkpoint(tmp_path / "c", found[0], found[1] | {"batch_size": 999})
    _, weights = run(tmp_path / "c")
    _, expected = run(tmp_path / "undisturbed")
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(one, other)
