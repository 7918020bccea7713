"""How fine-tuning gets past the frozen blocks, decided before any work from counts, shapes and limits.

The frozen blocks' answers (boundary activations) are kept once for each image and view, where disk and
memory allow it; otherwise fewer views are kept, fewer blocks are unfrozen, or the frozen blocks run again in
every epoch. Pure functions of numbers, so that `--dry-run` prints what a run would do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

# The other half is for whatever else uses the machine, and for the run's own model and shards.
DISK_SHARE: Final = 0.5
# The rest is for TensorFlow, the batches in flight and the programs' own memory.
MEMORY_SHARE: Final = 0.5
# Passes of an image through the whole network that are bearable without a cache and without a GPU.
_BEARABLE_PASSES: Final = 100_000
# Each costs several times the one before: its blocks see larger activations.
_DEEPER_TRIALS: Final = 2

Way = Literal["activations", "full graph", "features only"]


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where the backbone can be cut in two.

    Attributes:
        num_blocks: Blocks behind it.
        row_bytes: Bytes of the activations of one image in one view.
        shown: Their shape, for people.
    """

    num_blocks: int
    row_bytes: int
    shown: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine allows.

    Attributes:
        memory_bytes: Memory that this process may use, the cgroup's limit included.
        free_disk_bytes: Space that is free where the run works.
        has_gpu: Whether a GPU trains.
    """

    memory_bytes: int
    free_disk_bytes: int
    has_gpu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What fine-tuning would do if nothing were short.

    Attributes:
        num_train: Images to train on.
        num_validation: Images to choose by.
        num_backbone_blocks: Blocks that the backbone has.
        num_blocks: Blocks to unfreeze; where they are not given, deeper cuts may be tried after them.
        blocks_given: Whether the user set `num_blocks`, so that no other number will do.
        num_views: Views of each training image, the image as it is included.
        views_given: Whether the user chose the transforms, so that the image as it is will not do.
        mixes_pixels: Whether mixup is on.
        num_epochs: Passes over the training images.
    """

    num_train: int
    num_validation: int
    num_backbone_blocks: int
    num_blocks: int
    blocks_given: bool
    num_views: int
    views_given: bool
    mixes_pixels: bool
    num_epochs: int


@dataclass(frozen=True, slots=True)
class ActivationPlan:
    """What is done.

    Attributes:
        way: `activations` (only the suffix trains, from kept activations), `full graph` (the frozen blocks run
            again in every epoch), or `features only` (no block is unfrozen).
        trials: Numbers of blocks to unfreeze in one trial after the other, from few to many; whether all are tried
            depends on what the ones before come to.
        num_views: Views that are kept of each training image.
        disk_bytes: Most that the activations take on disk at one time.
        in_memory: Whether they fit into memory, so that the disk is read once.
        reason: Why, in one sentence.
    """

    way: Way
    trials: tuple[int, ...]
    num_views: int
    disk_bytes: int
    in_memory: bool
    reason: str


def deeper(num_blocks: int, num_backbone_blocks: int) -> tuple[int, ...]:
    """Return how many blocks to unfreeze in trials after that of `num_blocks`: half as many again each time."""
    found = []
    for _ in range(_DEEPER_TRIALS):
        num_blocks += -(-num_blocks // 2)
        if num_blocks < num_backbone_blocks:
            found.append(num_blocks)
    return tuple(found)


def plan_activations(wish: Wish, cuts: Sequence[Cut], limits: Limits) -> ActivationPlan:
    """Return how fine-tuning gets past the frozen blocks.

    First views are given up, down to one, until the activations fit into memory. One view may be larger than
    memory: it is mapped, and read from disk row by row. Then blocks are given up until they fit on disk.

    Args:
        wish: What would be done if nothing were short.
        cuts: Every cut of the backbone, in any order.
        limits: What the machine allows.
    """
    if not wish.num_blocks:
        return ActivationPlan("features only", (0,), 1, 0, True, "no block is to be unfrozen")
    if wish.mixes_pixels:
        return _full_graph(
            wish, "mixup blends pixels, so each epoch's images must pass the frozen blocks anew"
        )
    if wish.num_blocks >= wish.num_backbone_blocks:
        return _full_graph(wish, "all blocks are unfrozen, so there is no frozen part to compute once")
    by_blocks = {cut.num_blocks: cut for cut in cuts}
    fewest_views = 2 if wish.views_given else 1
    for num_blocks in (wish.num_blocks,) if wish.blocks_given else range(wish.num_blocks, 0, -1):
        for num_views in range(wish.num_views, fewest_views - 1, -1):
            needed = _bytes(wish, by_blocks[num_blocks], num_views)
            in_memory = needed <= MEMORY_SHARE * limits.memory_bytes
            if needed <= DISK_SHARE * limits.free_disk_bytes and (in_memory or num_views == fewest_views):
                reason = _reason(wish, by_blocks[num_blocks], num_views, needed, in_memory)
                trials = _trials(wish, by_blocks, num_blocks, num_views, limits)
                largest = max(_bytes(wish, by_blocks[each], num_views) for each in trials)
                return ActivationPlan("activations", trials, num_views, largest, in_memory, reason)
    return _without_cache(wish, by_blocks, limits, fewest_views)


def describe_cuts(wish: Wish, cuts: Sequence[Cut], limits: Limits) -> list[dict[str, str | int]]:
    """Return a row for every cut, from few blocks to many: shape, bytes for one view and for all, whether it fits."""
    rows: list[dict[str, str | int]] = []
    by_blocks = {cut.num_blocks: cut for cut in cuts}
    for cut in sorted(cuts, key=lambda cut: cut.num_blocks):
        needed = _bytes(wish, cut, wish.num_views)
        on_disk = _bytes(wish, cut, 1) <= DISK_SHARE * limits.free_disk_bytes
        fits = "memory" if needed <= MEMORY_SHARE * limits.memory_bytes and on_disk else "disk"
        rows.append(
            {
                "num_blocks": cut.num_blocks,
                "activations": by_blocks[cut.num_blocks].shown,
                "bytes_an_image": cut.row_bytes,
                "bytes_one_view": _bytes(wish, cut, 1),
                "bytes_all_views": needed,
                "fits": fits if on_disk else "no",
            }
        )
    return rows


def shown_bytes(number: float) -> str:
    """Return a number of bytes for people, for example `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


def _bytes(wish: Wish, cut: Cut, num_views: int) -> int:
    return (num_views * wish.num_train + wish.num_validation) * cut.row_bytes


def _trials(
    wish: Wish, by_blocks: dict[int, Cut], num_blocks: int, num_views: int, limits: Limits
) -> tuple[int, ...]:
    """Return `num_blocks`, and the deeper cuts whose activations fit into memory in as many views."""
    room = min(MEMORY_SHARE * limits.memory_bytes, DISK_SHARE * limits.free_disk_bytes)
    if wish.blocks_given or num_blocks < wish.num_blocks:
        return (num_blocks,)
    more = deeper(num_blocks, wish.num_backbone_blocks)
    return (num_blocks, *(each for each in more if _bytes(wish, by_blocks[each], num_views) <= room))


def _full_graph(wish: Wish, reason: str) -> ActivationPlan:
    return ActivationPlan("full graph", (wish.num_blocks,), 1, 0, True, reason)


def _reason(wish: Wish, cut: Cut, num_views: int, needed: int, in_memory: bool) -> str:
    views = "view" if num_views == 1 else "views"
    reason = (
        f"{num_views} {views} of {cut.shown} an image take {shown_bytes(needed)}, "
        f"{'which memory holds' if in_memory else 'more than memory holds, so they are read from disk'}"
    )
    given_up = []
    if num_views < wish.num_views:
        given_up.append(f"{wish.num_views} views")
    if cut.num_blocks < wish.num_blocks:
        given_up.append(f"{wish.num_blocks} blocks")
    return reason + (f"; {' of '.join(given_up)} would not fit" if given_up else "")


def _without_cache(
    wish: Wish, by_blocks: dict[int, Cut], limits: Limits, fewest_views: int
) -> ActivationPlan:
    least = min(
        _bytes(wish, by_blocks[number], fewest_views)
        for number in ((wish.num_blocks,) if wish.blocks_given else range(1, wish.num_blocks + 1))
    )
    short = (
        f"the smallest activations take {shown_bytes(least)}, more than half of the "
        f"{shown_bytes(limits.free_disk_bytes)} that are free on disk"
    )
    bearable = wish.num_train * wish.num_epochs <= _BEARABLE_PASSES
    if wish.blocks_given or limits.has_gpu or bearable:
        return _full_graph(wish, short)
    plan = _full_graph(
        wish, f"{short}, and {wish.num_train * wish.num_epochs:,} passes of whole images take days"
    )
    return dataclasses.replace(plan, way="features only", trials=(0,))
