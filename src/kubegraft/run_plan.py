"""What a run would do and keep, worked out before any of it: `kubegraft run --dry-run`.

Images are counted, not read; the backbone is built with random weights, for its shapes.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kubegraft import storage
from kubegraft.activation_plan import Cut, Limits, describe_cuts, plan_activations
from kubegraft.config import AUTO
from kubegraft.data.layout import Layout, read_layout
from kubegraft.data.manifest import MANIFEST_FILE, SPLITS, load_manifest
from kubegraft.data.sources import open_source
from kubegraft.errors import ConfigError
from kubegraft.machine_limits import free_disk_bytes, usable_memory_bytes
from kubegraft.recipes import DatasetFacts, fine_tune_wish, resolve_fine_tune, resolve_head
from kubegraft.run_config import RunConfig

# Without decoding nothing is known of their sides; photographs are larger than any backbone's input.
_ASSUMED_SIDE: Final = 1024
# An average photograph of ImageNet, for images that are not there to be measured.
_ASSUMED_IMAGE_BYTES: Final = 110_000
_FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class ImageCounts:
    """How many images a source has.

    Attributes:
        by_split: Images of each class, by split; in one order of classes.
        num_bytes: Bytes that ingest will write of them; 0 for a dataset, which is there already.
    """

    by_split: Mapping[str, tuple[int, ...]]
    num_bytes: int = 0

    def facts(self) -> DatasetFacts:
        """Return what recipes choose from, for images that are larger than any backbone's input."""
        train = self.by_split["train"]
        return DatasetFacts(
            num_train=sum(train),
            num_validation=sum(self.by_split["validation"]),
            num_classes=len(train),
            smallest_class=min(train),
            largest_class=max(train),
            median_height=_ASSUMED_SIDE,
            median_width=_ASSUMED_SIDE,
        )


def plan_run(
    run_config: RunConfig,
    output_dir: Path,
    *,
    num_images: int | None = None,
    num_classes: int = 10,
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
) -> dict[str, Any]:
    """Return what a run with this config would do.

    Args:
        run_config: What would be run.
        output_dir: Where it would write; decides which disk counts.
        num_images: Plan for so many images instead of those of the source.
        num_classes: Plan for so many classes of equal size; used with `num_images` only.
        memory_bytes: Plan for so much memory instead of this machine's, or its container's.
        disk_bytes: Plan for so much free disk instead of this machine's.

    Raises:
        ConfigError: If the source's images can't be counted without fetching or unpacking it.
        DataError: If its folders fit no layout.
    """
    for name, value in (("num_images", num_images), ("num_classes", num_classes)):
        if value is not None and value < 2:
            raise ConfigError(f"`{name}` must be at least 2. Received: {name}={value!r}.")
    counts = (
        assumed_counts(num_images, num_classes, run_config)
        if num_images is not None
        else count_images(run_config)
    )
    plan = _plan(run_config, counts, output_dir, memory_bytes, disk_bytes)
    if num_images is not None:
        size = f"images of {_ASSUMED_IMAGE_BYTES // 1000} kB each"
        plan["assumed"] = f"{size}, {plan['assumed']}" if plan["assumed"] else size
    return plan


def assumed_counts(num_images: int, num_classes: int, run_config: RunConfig) -> ImageCounts:
    """Return the counts of so many images in so many classes of equal size, split as ingest splits them."""
    sizes = [num_images // num_classes + (label < num_images % num_classes) for label in range(num_classes)]
    return ImageCounts(_carved(sizes, {}, run_config), num_images * _ASSUMED_IMAGE_BYTES)


def count_images(run_config: RunConfig) -> ImageCounts:
    """Return how many files each class and split of the source has; a dataset of `ingest` says it itself.

    Raises:
        ConfigError: If the source would have to be fetched or unpacked first.
        DataError: If its folders fit no layout.
    """
    source = run_config.ingest.source
    if not source.startswith("sample://"):
        path = None if storage.is_remote(source) else storage.local_path(source)
        if path is None or not path.is_dir():
            raise ConfigError(
                "`source` must be a local folder for --dry-run, which neither fetches nor unpacks. Received: "
                f"source={storage.public_uri(source)!r}. Say how many images there are with --num-images."
            )
        if (path / MANIFEST_FILE).exists():
            manifest = load_manifest(path)
            return ImageCounts({name: split.class_counts for name, split in manifest.splits.items()})
    with tempfile.TemporaryDirectory() as scratch:
        opened = open_source(source, Path(scratch))
        layout = read_layout(opened.root, strip_top_folder=opened.is_archive)
    return counts_of(layout, run_config)


def counts_of(layout: Layout, run_config: RunConfig) -> ImageCounts:
    """Return how many files each class and split has, before any is decoded."""
    usable = [file for file in layout.files if not file.reason]
    found = Counter((file.split or "train", file.label) for file in usable)
    given = {
        split: [found[split, name] for name in layout.classes] for split in layout.given if split != "train"
    }
    train = [found["train", name] for name in layout.classes]
    return ImageCounts(_carved(train, given, run_config), sum(file.size for file in usable))


def _carved(
    train: list[int], given: Mapping[str, list[int]], run_config: RunConfig
) -> dict[str, tuple[int, ...]]:
    """Return the counts of the three splits, of which those that are not given are carved from train."""
    fractions = {
        "validation": run_config.ingest.validation_fraction,
        "test": run_config.ingest.test_fraction,
    }
    carved = {
        split: [round(fraction * size) for size in train]
        for split, fraction in fractions.items()
        if split not in given
    }
    left = [max(size - sum(part[label] for part in carved.values()), 1) for label, size in enumerate(train)]
    splits = {"train": left, **given, **carved}
    return {split: tuple(splits[split]) for split in SPLITS}


def _plan(
    run_config: RunConfig,
    counts: ImageCounts,
    output_dir: Path,
    memory_bytes: int | None,
    disk_bytes: int | None,
) -> dict[str, Any]:
    import kubegraft.tensorflow_setup  # noqa: F401 - before TensorFlow
    from kubegraft.modeling.backbones import get_backbone
    from kubegraft.modeling.levels import with_levels
    from kubegraft.modeling.splitting import boundary_of
    from kubegraft.training.distribution import has_gpu, precision_policy

    facts, backbone = counts.facts(), get_backbone(run_config.head.backbone)
    head, _ = resolve_head(
        run_config.head,
        facts,
        native_input_size=backbone.native_input_size,
        accepted_input_size=backbone.accepted_input_size,
    )
    tuned, choices = resolve_fine_tune(
        run_config.fine_tune,
        facts,
        num_backbone_blocks=backbone.num_blocks,
        num_backbone_parameters=backbone.num_parameters,
    )
    backbone.check_num_blocks(tuned.num_blocks)
    core = backbone.build(head.input_size)
    if head.features == "levels":
        core = with_levels(core, backbone)
    bits = "bfloat16" if "bfloat16" in precision_policy(tuned.mixed_precision) else "float32"
    boundaries = [
        dataclasses.replace(boundary_of(core, backbone, number), dtype=bits)
        for number in range(1, backbone.num_blocks)
    ]
    cuts = [Cut(each.num_blocks, each.row_bytes, each.shown) for each in boundaries]
    free_bytes = disk_bytes or free_disk_bytes(output_dir)
    dim = int(core.output_shape[-1])
    pooled_bytes = (facts.num_train + facts.num_validation) * dim * _FLOAT_BYTES
    # What is there by the time that fine-tuning looks: shards, and features in the cache, if that is on this disk.
    written_bytes = counts.num_bytes + pooled_bytes
    limits = Limits(
        memory_bytes or usable_memory_bytes(), max(free_bytes - written_bytes, 0), has_gpu=has_gpu()
    )
    wish = fine_tune_wish(run_config.fine_tune, tuned, facts, backbone.num_blocks)
    plan = plan_activations(wish, cuts, limits)
    return {
        "images": {split: sum(counts.by_split[split]) for split in SPLITS},
        "num_classes": facts.num_classes,
        "image_bytes": counts.num_bytes,
        "memory_bytes": limits.memory_bytes,
        "free_disk_bytes": free_bytes,
        "written_before_fine_tuning_bytes": written_bytes,
        "backbone": backbone.name,
        "input_size": head.input_size,
        "pooled_features_bytes": pooled_bytes,
        "fine_tune": {**dataclasses.asdict(plan), "num_epochs": tuned.num_epochs},
        "augmentation": "none" if plan.way == "activations" and plan.num_views == 1 else tuned.augmentation,
        "choices": [dataclasses.asdict(choice) for choice in choices],
        "cuts": describe_cuts(wish, cuts, limits),
        "assumed": "images of at least the backbone's size" if run_config.head.input_size == AUTO else "",
    }
