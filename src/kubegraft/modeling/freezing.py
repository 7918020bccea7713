"""What is trained and what stays as it is: a plan by block that covers every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kubegraft.errors import ConfigError, ModelError
from kubegraft.modeling.backbone import Backbone
from kubegraft.modeling.classifier import parts


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One weight of a classifier in the plan.

    Attributes:
        variable: Path of the weight, such as `block3_project_conv/kernel`.
        part: `backbone` or `head`.
        block: Block of the backbone; -1 in the head.
        num_parameters: Numbers it holds.
        trainable: Whether training changes it.
    """

    variable: str
    part: str
    block: int
    num_parameters: int
    trainable: bool


def freeze_backbone(model: Any) -> None:
    """Leave the head alone trainable; no weight of the backbone is, batch-norm statistics included."""
    found = parts(model)
    found.backbone.trainable = False
    _release_head(model)


def unfreeze_last_blocks(model: Any, backbone: Backbone, num_blocks: int) -> list[tuple[str, int]]:
    """Make the head and the last blocks of the backbone trainable, but never a batch norm of the backbone.

    Args:
        model: Classifier on `backbone`; changed in place.
        backbone: Says where its blocks end.
        num_blocks: Blocks to unfreeze, in [0, `backbone.num_blocks`].

    Returns:
        (path, block) of every weight of the backbone that is trainable now.

    Raises:
        ConfigError: If the backbone has fewer blocks.
        ModelError: If `model` is built on another backbone.
    """
    if not 0 <= num_blocks <= backbone.num_blocks:
        raise ConfigError(
            f"`num_blocks` must be in [0, {backbone.num_blocks}] for {backbone.name}. Received: "
            f"num_blocks={num_blocks!r}. {backbone.num_blocks} unfreezes the whole backbone."
        )
    core = parts(model).backbone
    blocks = _blocks(backbone, core)
    # Setting a container's flag sets that of everything in it.
    core.trainable = True
    for layer in core.layers:
        _set_trainable(layer, blocks[layer.name] >= backbone.num_blocks - num_blocks)
    _release_head(model)
    rows = training_plan(model, backbone)
    return [(row.variable, row.block) for row in rows if row.part == "backbone" and row.trainable]


def training_plan(model: Any, backbone: Backbone) -> list[PlanRow]:
    """Return a row for every weight of a classifier as it is now, the backbone's in order, then the head's.

    Raises:
        ModelError: If `model` is built on another backbone.
    """
    core = parts(model).backbone
    blocks = _blocks(backbone, core)
    trainable = {id(weight) for weight in model.trainable_weights}
    rows = [
        _row(weight, "backbone", blocks[layer.name], trainable)
        for layer in core.layers
        for weight in layer.weights
    ]
    rows += [_row(weight, "head", -1, trainable) for weight in model.get_layer("head").weights]
    if len(rows) != len(model.weights):
        raise ModelError(
            f"The training plan must cover every weight. Received: {len(rows)} rows for {len(model.weights)} weights. "
            "This is a defect of kubegraft: please report it with the backbone's name."
        )
    return rows


def rate_multipliers(model: Any, backbone: Backbone, num_blocks: int, rate_decay: float) -> list[float]:
    """Return a factor on the learning rate of each trainable variable: lower the earlier its block.

    The head and the last block learn at the full rate, each earlier block at `rate_decay` times the rate
    of the block after it.

    Args:
        model: Classifier whose last blocks are unfrozen.
        backbone: Says where its blocks end.
        num_blocks: Blocks that are unfrozen.
        rate_decay: Factor from a block to the one before, in (0, 1].

    Returns:
        Factors in (0, 1], in the order of `model.trainable_variables`.

    Raises:
        ModelError: If an earlier block is trainable than `num_blocks` says.

    Source:
        Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", section 3.2.
    """
    core = parts(model).backbone
    blocks = _blocks(backbone, core)
    block_of = {id(weight): blocks[layer.name] for layer in core.layers for weight in layer.weights}
    last = backbone.num_blocks - 1
    distances = [last - block_of.get(id(variable), last) for variable in model.trainable_variables]
    if max(distances, default=0) >= max(num_blocks, 1):
        raise ModelError(
            f"`num_blocks` must be the number of blocks that are trainable. Received: num_blocks={num_blocks!r}, "
            f"but block {last - max(distances)} of {backbone.num_blocks} is trainable. Unfreeze as many first."
        )
    return [rate_decay**distance for distance in distances]


def _release_head(model: Any) -> None:
    model.get_layer("head").trainable = True
    parts(model).standardise.trainable = False


def _set_trainable(layer: Any, trainable: bool) -> None:
    import keras

    for inner in layer.layers if hasattr(layer, "layers") else (layer,):
        inner.trainable = trainable and not isinstance(inner, keras.layers.BatchNormalization)


def _blocks(backbone: Backbone, core: Any) -> dict[str, int]:
    try:
        return backbone.block_of_layer(core)
    except KeyError as error:
        raise ModelError(
            f"`model` must be built on {backbone.name}. Received: a backbone without its operation {error}. "
            "Take the backbone that the model's metadata names."
        ) from error


def _row(weight: Any, part: str, block: int, trainable: set[int]) -> PlanRow:
    return PlanRow(weight.path, part, block, int(weight.shape.num_elements() or 0), id(weight) in trainable)
