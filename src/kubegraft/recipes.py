"""Pure functions from facts about the dataset and the backbone to every number the user left open.

Each returns the config with no automatic value left in it, and the choices with their reasons, which the
report shows. A value that the user gave is never changed.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from kubegraft.activation_plan import Wish
from kubegraft.config import ADAMW_FIELDS, AUTO, AUTO_NAME, FineTuneConfig, HeadConfig, TrainingConfig

IMBALANCE_TO_BALANCE: Final = 3.0
MIXUP_ALPHA: Final = 0.2
_IMAGES_A_REPLICA: Final = 32
_FEWEST_STEPS: Final = 8
# Below this side an image is all detail; enlarging it more than this many times adds nothing but work.
_ENLARGEMENT: Final = 3
_SMALLEST_USEFUL_SIDE: Final = 96
_LARGE_BACKBONE_PARAMETERS: Final = 10_000_000
# Views that are kept of each image, up to so many images: more vary enough by themselves.
_NUM_VIEWS: Final = 2
_MOST_VARIED: Final = 200_000
_EPOCHS_A_VIEW: Final = 4
# Up to so many training images, features of several levels take a few GB at most.
_MOST_WITH_LEVELS: Final = 200_000
# The last feature map of the registered backbones has 512 to 2,560 channels.
_WEIGHTS_OF_A_CLASS: Final = 1000

Config = TypeVar("Config", bound=TrainingConfig)


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """What recipes choose hyper-parameters from; images and pixels of the train split unless named else.

    Attributes:
        num_train: Images to train on.
        num_validation: Images to choose a model by.
        num_classes: Classes.
        smallest_class: Images of the smallest class.
        largest_class: Images of the largest class.
        median_height: Pixels.
        median_width: Pixels.
    """

    num_train: int
    num_validation: int
    num_classes: int
    smallest_class: int
    largest_class: int
    median_height: int
    median_width: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One value and where it comes from.

    Attributes:
        name: Field of the config.
        value: Resolved value.
        reason: Why, in one sentence; "set by the user" for a value that was given.
    """

    name: str
    value: Any
    reason: str


def resolve_head(
    config: HeadConfig,
    facts: DatasetFacts,
    *,
    native_input_size: int,
    accepted_input_size: Any,
    num_replicas: int = 1,
) -> tuple[HeadConfig, tuple[Choice, ...]]:
    """Return the head's config with every open value chosen, and the choices.

    With the solver L-BFGS, what only AdamW uses stays open, and so does a weight decay that is to be chosen
    on validation.

    Args:
        config: As the user gave it.
        facts: DatasetFacts about the dataset.
        native_input_size: Side in pixels on which the backbone was pretrained.
        accepted_input_size: Function from a wanted side in pixels to the nearest one, not smaller, that the
            backbone accepts.
        num_replicas: Devices that train together.
    """
    batch_size, batch_reason = _batch_size(facts, num_replicas, "a head is cheap to train")
    steps_per_epoch = -(-facts.num_train // batch_size)
    proposals = {
        "input_size": _input_size(facts, native_input_size, accepted_input_size),
        "batch_size": (batch_size, batch_reason),
        "num_epochs": _head_epochs(steps_per_epoch),
        "learning_rate": _scaled(
            1e-3, "AdamW's usual rate for a new head on standardised features", config, batch_size
        ),
        "weight_decay": (
            (1.0, "fewer images than a linear head has weights: strong decay")
            if facts.num_train < _WEIGHTS_OF_A_CLASS * facts.num_classes
            else (0.1, "many images: mild decay")
        ),
        "dropout": (
            (0.3, "few images, as many features")
            if facts.num_train < _WEIGHTS_OF_A_CLASS * facts.num_classes
            else (0.2, "hidden units should not rely on each other")
        ),
        "label_smoothing": (0.0, "smoothing would blur the probabilities that are calibrated later"),
        "patience": (15, "the rate falls as a cosine, so that late epochs may still improve"),
        "augmentation": ("none", "without augmentation the backbone sees each image once, not every epoch"),
        "class_weights": _class_weights(facts),
        "features": _features(facts),
        "solver": _solver(config),
    }
    if (proposals["solver"][0] if config.solver == AUTO_NAME else config.solver) == "lbfgs":
        # These stay open: nothing uses them, and the decay is chosen on validation.
        proposals = {
            name: each for name, each in proposals.items() if name not in (*ADAMW_FIELDS, "weight_decay")
        }
    return _resolved(config, proposals)


def resolve_fine_tune(
    config: FineTuneConfig,
    facts: DatasetFacts,
    *,
    num_backbone_blocks: int,
    num_backbone_parameters: int,
    num_replicas: int = 1,
) -> tuple[FineTuneConfig, tuple[Choice, ...]]:
    """Return the fine-tuning config with every open value chosen, and the choices.

    Args:
        config: As the user gave it.
        facts: DatasetFacts about the dataset.
        num_backbone_blocks: Blocks that the backbone has.
        num_backbone_parameters: Parameters that the backbone has.
        num_replicas: Devices that train together.
    """
    large = num_backbone_parameters > _LARGE_BACKBONE_PARAMETERS
    batch_size, batch_reason = _batch_size(facts, num_replicas, "fit any device")
    rate, rate_reason = (
        (5e-4, "a large backbone is moved gently")
        if large
        else (1e-3, "a small backbone bears more, and only weights with a clear gradient move by as much")
    )
    proposals = {
        "num_blocks": _num_blocks(config, facts, num_backbone_blocks),
        "batch_size": (batch_size, batch_reason),
        "num_epochs": _fine_tune_epochs(facts),
        "learning_rate": _scaled(rate, rate_reason, config, batch_size),
        "rate_decay": (0.85, "earlier blocks are more general, so that each learns slower than the next"),
        "weight_decay": (0.01, "AdamW's usual decay"),
        "label_smoothing": (0.0, "smoothing would blur the probabilities that are calibrated later"),
        "patience": (6, "the first epochs at the peak rate are often worse than the start"),
        "augmentation": _fine_tune_augmentation(facts),
        "class_weights": _class_weights(facts),
    }
    return _resolved(dataclasses.replace(config, unfreeze_fraction=AUTO), proposals)


def fine_tune_wish(
    given: FineTuneConfig, resolved: FineTuneConfig, facts: DatasetFacts, num_backbone_blocks: int
) -> Wish:
    """Return what fine-tuning would do if memory and disk were endless.

    Args:
        given: Config as the user gave it.
        resolved: The same with every open value chosen.
        facts: DatasetFacts about the dataset.
        num_backbone_blocks: Blocks that the backbone has.
    """
    transforms = {name.strip() for name in resolved.augmentation.split(",")} - {"none"}
    views = _NUM_VIEWS if facts.num_train <= _MOST_VARIED else 1
    # A view costs a pass through the frozen blocks, about what an epoch costs, and pays only when it is seen often.
    views = max(1, min(views, resolved.num_epochs // _EPOCHS_A_VIEW))
    chosen = given.augmentation not in (AUTO_NAME, "none")
    if chosen:
        views = max(views, 2)
    return Wish(
        num_train=facts.num_train,
        num_validation=facts.num_validation,
        num_backbone_blocks=num_backbone_blocks,
        num_blocks=resolved.num_blocks,
        blocks_given=given.num_blocks != AUTO or given.unfreeze_fraction != AUTO,
        num_views=views if transforms else 1,
        views_given=chosen,
        mixes_pixels="mixup" in transforms,
        num_epochs=resolved.num_epochs,
    )


def _resolved(config: Config, proposals: dict[str, tuple[Any, str]]) -> tuple[Config, tuple[Choice, ...]]:
    values: dict[str, Any] = {}
    choices = []
    for name, (proposed, reason) in proposals.items():
        given = getattr(config, name)
        if given in (AUTO, AUTO_NAME):
            values[name] = proposed
            choices.append(Choice(name, proposed, reason))
        else:
            choices.append(Choice(name, given, "set by the user"))
    return dataclasses.replace(config, **values), tuple(choices)


def _input_size(facts: DatasetFacts, native: int, accepted: Any) -> tuple[int, str]:
    side = min(facts.median_height, facts.median_width)
    wanted = max(_SMALLEST_USEFUL_SIDE, _ENLARGEMENT * side)
    if wanted >= native:
        return native, f"the backbone was pretrained at {native} px, and images are {side} px (median side)"
    chosen = min(accepted(wanted), native)
    return chosen, f"images are only {side} px (median side): {native} px would cost more and show no more"


def _batch_size(facts: DatasetFacts, num_replicas: int, why: str) -> tuple[int, str]:
    """Return 32 images for each replica, as far as that leaves an epoch enough steps."""
    largest = max(facts.num_train // (_IMAGES_A_REPLICA * _FEWEST_STEPS), 1)
    batch_size = _IMAGES_A_REPLICA * min(num_replicas, largest)
    if batch_size == _IMAGES_A_REPLICA:
        return batch_size, f"small batches generalise well, and {why}"
    return batch_size, f"32 on each of {num_replicas} devices, with at least {_FEWEST_STEPS} steps an epoch"


def _scaled(rate: float, reason: str, config: TrainingConfig, batch_size: int) -> tuple[float, str]:
    """Return the rate for a batch that grew with the replicas: by its root, as AdamW's noise wants it.

    Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", section 5. A batch size that
    the user set says nothing about replicas.
    """
    factor = math.sqrt(batch_size / _IMAGES_A_REPLICA)
    if factor == 1 or config.batch_size != AUTO:
        return rate, reason
    return (
        rate * factor,
        f"{reason}; times {factor:.3g}, the root of how much the batch grew with the devices",
    )


def _solver(config: HeadConfig) -> tuple[str, str]:
    if config.head != "linear":
        return "adamw", "a head with hidden layers has no single optimum to solve for"
    if config.augmentation not in (AUTO_NAME, "none"):
        return "adamw", "augmented features differ in every epoch"
    given = [name for name in (*ADAMW_FIELDS, "weight_decay") if getattr(config, name) != AUTO]
    if config.dropout > 0:
        given.append("dropout")
    if given:
        return "adamw", f"`{given[0]}` was set by the user"
    return "lbfgs", "the best linear head on fixed features can be solved for, its weight decay by validation"


def _features(facts: DatasetFacts) -> tuple[str, str]:
    if facts.num_train > _MOST_WITH_LEVELS:
        return (
            "last",
            f"more than {_MOST_WITH_LEVELS:,} training images: several levels of all need much memory",
        )
    return "levels", "earlier blocks keep what ImageNet's classes don't need, and cost no further pass"


def _head_epochs(steps_per_epoch: int) -> tuple[int, str]:
    epochs = max(10, min(60, -(-3000 // steps_per_epoch)))
    return epochs, f"about 3,000 steps of {steps_per_epoch} an epoch, within 10 and 60"


def _fine_tune_epochs(facts: DatasetFacts) -> tuple[int, str]:
    epochs = max(3, min(8, -(-3_000 // max(facts.num_train, 1))))
    return epochs, f"about 3,000 images seen of {facts.num_train}, within 3 and 8 epochs"


def _num_blocks(config: FineTuneConfig, facts: DatasetFacts, num_blocks: int) -> tuple[int, str]:
    if config.unfreeze_fraction != AUTO:
        chosen = min(num_blocks, round(config.unfreeze_fraction * num_blocks))
        return chosen, f"{config.unfreeze_fraction:g} of {num_blocks} blocks, as set by the user"
    per_class = facts.num_train / facts.num_classes
    fraction = 0.15 if per_class < 20 else 0.35 if per_class < 1000 else 0.6
    chosen = max(1, round(fraction * num_blocks))
    return chosen, f"{per_class:.0f} training images a class carry about {fraction:g} of {num_blocks} blocks"


def _fine_tune_augmentation(facts: DatasetFacts) -> tuple[str, str]:
    if min(facts.median_height, facts.median_width) < 16:
        return "none", "tiny images bear no distortion"
    return (
        "crop,rotation,colour",
        "light changes of framing and light; no flip, which may change the class (digits, signs, text)",
    )


def _class_weights(facts: DatasetFacts) -> tuple[str, str]:
    ratio = facts.largest_class / max(facts.smallest_class, 1)
    if ratio > IMBALANCE_TO_BALANCE:
        return "balanced", f"the largest class has {ratio:.1f} times the images of the smallest"
    return "none", f"classes are of similar size (largest to smallest {ratio:.1f})"
