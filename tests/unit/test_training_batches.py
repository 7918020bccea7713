import numpy as np
import pytest

from kubegraft.training.batches import balanced_class_weights, epoch_batches

LABELS = np.array([0, 1, 2] * 7 + [0], np.int32)


def batches(**options):
    return epoch_batches(LABELS, **{"batch_size": 8, "seed": 3, "epoch": 0} | options)


def test_every_example_counts_once_an_epoch():
    epoch = batches()
    seen = epoch.index[epoch.real == 1]
    assert sorted(seen) == list(range(len(LABELS)))


def test_padding_has_no_weight_and_a_batch_weighs_one():
    epoch = batches()
    assert epoch.index.shape == (3, 8)
    assert not epoch.weight[epoch.real == 0].any()
    np.testing.assert_allclose(epoch.weight.sum(1), 1, rtol=1e-6)


def test_an_epoch_is_a_function_of_seed_and_number():
    for name in ("index", "partner", "share", "key"):
        np.testing.assert_array_equal(getattr(batches(epoch=4), name), getattr(batches(epoch=4), name))
    assert (batches(epoch=4).index != batches(epoch=5).index).any()
    assert (batches(seed=1).index != batches(seed=2).index).any()


def test_an_example_has_the_same_augmentation_key_whatever_the_batch_size():
    def keys(batch_size):
        epoch = batches(batch_size=batch_size, shuffle=False)
        return dict(zip(epoch.index.ravel(), epoch.key.ravel(), strict=True))

    assert keys(8) == keys(5)


def test_a_batch_may_be_larger_than_the_split():
    epoch = batches(batch_size=100)
    assert epoch.index.shape == (1, 100)
    assert epoch.real.sum() == len(LABELS)


def test_mixup_keeps_the_larger_share_for_the_example_itself():
    epoch = batches(mixup_alpha=0.2)
    assert ((epoch.share >= 0.5) & (epoch.share <= 1)).all()
    assert (epoch.share < 1).any()
    assert (batches().share == 1).all()


def test_balanced_weights_let_each_class_count_the_same():
    counts = np.array([100, 10, 1])
    weights = balanced_class_weights(counts)
    np.testing.assert_allclose(weights * counts, np.full(3, counts.sum() / 3), rtol=1e-6)


def test_class_weights_multiply_the_weight():
    weights = np.array([1, 2, 4], np.float32)
    epoch = batches(class_weights=weights)
    real = epoch.real == 1
    np.testing.assert_allclose(
        epoch.weight[real], (weights[LABELS[epoch.index]] / epoch.real.sum(1, keepdims=True))[real], rtol=1e-6
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_positions_name_the_place_in_the_global_batch(shuffle):
    assert (batches(shuffle=shuffle).position == np.arange(8)).all()
