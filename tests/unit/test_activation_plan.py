"""What fine-tuning keeps of the frozen blocks, and what it gives up where memory or disk are short."""

import dataclasses

import pytest

from kubegraft.activation_plan import Cut, Limits, Wish, deeper, plan_activations
from kubegraft.config import FineTuneConfig
from kubegraft.machine_limits import free_disk_bytes, memory_limit_bytes
from kubegraft.recipes import DatasetFacts, fine_tune_wish, resolve_fine_tune

GIB = 2**30
# EfficientNet-Lite0 at 224 pixels, as far as it matters.
CUTS = [
    *(Cut(n, 37_632, "7 x 7 x 192") for n in range(1, 5)),
    *(Cut(n, 87_808, "14 x 14 x 112") for n in (5, 6)),
    *(Cut(n, 62_720, "14 x 14 x 80") for n in (7, 8, 9)),
    *(Cut(n, 125_440, "28 x 28 x 40") for n in range(10, 16)),
]
WISH = Wish(
    num_train=1_000,
    num_validation=300,
    num_backbone_blocks=16,
    num_blocks=6,
    blocks_given=False,
    num_views=4,
    views_given=False,
    mixes_pixels=False,
    num_epochs=9,
)
ROOMY = Limits(16 * GIB, 500 * GIB)


def plan(limits=ROOMY, **changes):
    return plan_activations(dataclasses.replace(WISH, **changes), CUTS, limits)


def test_where_all_fits_nothing_is_given_up():
    found = plan()
    assert (found.way, found.trials, found.num_views, found.in_memory) == ("activations", (6, 9, 14), 4, True)
    # One cut's activations are there at a time.
    assert found.disk_bytes == 4_300 * 125_440


@pytest.mark.parametrize(
    ("first", "expected"), [(0, ()), (1, (2, 3)), (3, (5, 8)), (6, (9, 14)), (9, (14,)), (12, ())]
)
def test_each_deeper_trial_has_half_as_many_blocks_again(first, expected):
    assert tuple(each for each in deeper(first, 16) if each) == expected


def test_deeper_cuts_that_do_not_fit_into_memory_are_not_tried():
    assert plan(Limits(GIB, 500 * GIB)).trials == (6, 9)
    assert plan(Limits(int(0.75 * GIB), 500 * GIB)).trials == (6, 9)
    assert plan(num_blocks=4, blocks_given=True).trials == (4,)


def test_views_go_before_blocks_where_memory_is_short():
    found = plan(Limits(int(0.5 * GIB), 500 * GIB))
    assert (found.trials[0], found.num_views, found.in_memory) == (6, 2, True)
    assert "4 views would not fit" in found.reason


def test_one_view_may_be_larger_than_memory_but_not_than_the_disk():
    million = {"num_train": 1_000_000, "num_validation": 100_000}
    on_disk = plan(Limits(16 * GIB, 500 * GIB), **million)
    assert (on_disk.way, on_disk.num_views, on_disk.in_memory) == ("activations", 1, False)
    assert "read from disk" in on_disk.reason
    smaller = plan(Limits(16 * GIB, 170 * GIB), **million)
    assert smaller.trials == (4,)
    assert smaller.disk_bytes <= 85 * GIB
    nothing = plan(Limits(16 * GIB, 20 * GIB), **million)
    assert (nothing.way, nothing.trials) == ("features only", (0,))
    assert plan(Limits(16 * GIB, 20 * GIB, has_gpu=True), **million).way == "full graph"


def test_blocks_and_transforms_of_the_user_stay():
    given = plan(Limits(16 * GIB, GIB // 2), blocks_given=True)
    assert (given.way, given.trials) == ("activations", (6,))
    none_fits = plan(Limits(16 * GIB, GIB // 10), blocks_given=True)
    assert (none_fits.way, none_fits.trials) == ("full graph", (6,))
    assert plan(Limits(GIB // 10, 500 * GIB), views_given=True).num_views == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mixes_pixels": True}, "mixup"),
        ({"num_blocks": 16}, "no frozen part"),
        ({"num_blocks": 17}, "no frozen part"),
    ],
    ids=["mixup", "all blocks", "more"],
)
def test_what_must_pass_the_frozen_blocks_trains_the_full_graph(changes, reason):
    found = plan(**changes)
    assert found.way == "full graph"
    assert reason in found.reason


@pytest.mark.parametrize(
    ("options", "num_train", "expected"),
    [
        ({}, 300, 2),
        ({}, 1_000, 1),
        ({"num_epochs": 8}, 150_000, 2),
        ({}, 1_000_000, 1),
        ({"augmentation": "flip"}, 1_000_000, 2),
        ({"augmentation": "none"}, 1_000, 1),
        ({"num_epochs": 7}, 300, 1),
    ],
    ids=["few", "fewer epochs", "more", "many", "many, but the user wants it", "none", "too few epochs"],
)
def test_views_kept_of_each_image(options, num_train, expected):
    facts = DatasetFacts(num_train, 300, 10, num_train // 10, num_train // 10, 100, 100)
    given = FineTuneConfig(**options)
    resolved, _ = resolve_fine_tune(given, facts, num_backbone_blocks=16, num_backbone_parameters=3_000_000)
    assert fine_tune_wish(given, resolved, facts, 16).num_views == expected


def test_the_smallest_limit_of_nested_cgroups_counts(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/kubepods/pod1\n")
    inner = tmp_path / "kubepods" / "pod1"
    inner.mkdir(parents=True)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "kubepods" / "memory.max").write_text(f"{4 * GIB}\n")
    (inner / "memory.max").write_text(f"{8 * GIB}\n")
    assert memory_limit_bytes(tmp_path, membership) == 4 * GIB
    version_1 = tmp_path / "memory" / "kubepods" / "pod1"
    version_1.mkdir(parents=True)
    (version_1 / "memory.limit_in_bytes").write_text(f"{2 * GIB}\n")
    membership.write_text("3:cpu,cpuacct:/other\n5:memory:/kubepods/pod1\n")
    assert memory_limit_bytes(tmp_path, membership) == 2 * GIB


def test_free_disk_of_a_directory_that_is_not_there_yet(tmp_path):
    assert free_disk_bytes(tmp_path / "a" / "b") > 0
