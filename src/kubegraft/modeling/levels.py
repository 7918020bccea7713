"""What the head sees besides the last feature map: feature maps of earlier blocks, which keep what is fine.

The last blocks of a backbone tell apart what ImageNet's classes tell apart; a head on classes of another kind, such as
hand signs, scratches or cells, often finds more in the middle. To read there costs no forward pass, and almost no
time. After Evci et al. 2022, "Head2Toe: Utilizing Intermediate Representations for Better Transfer Learning",
section 3, but with few places to read at, so that no features have to be selected.
"""

from __future__ import annotations

from typing import Any, Final

from kubegraft.modeling.backbone import Backbone

# Names of the layers that this adds: those that average, and the one that joins them.
LEVEL_PREFIX: Final = "level_"
FEATURES_LAYER: Final = "features"
_QUARTERS: Final = (1, 2, 3)
_CELLS: Final = 2


def level_blocks(num_blocks: int) -> tuple[int, ...]:
    """Return the blocks whose ends are read, counted from 0: at a quarter, half and three quarters of the depth.

    Args:
        num_blocks: Blocks of the backbone. Its last one is never among them: the last feature map is read anyway.
    """
    ends = {-(-num_blocks * quarter // 4) for quarter in _QUARTERS}
    return tuple(sorted(end - 1 for end in ends if end < num_blocks))


def with_levels(core: Any, backbone: Backbone) -> Any:
    """Return the backbone with one vector of features as its output in place of the last feature map.

    The last feature map is averaged, as usual. Of each earlier level the averages over the four quarters of the
    image are taken, which also tell where something is; or over the whole image, where four would be more
    features than the last feature map has. So a vector is two to four times as long as without levels.

    Args:
        core: Keras model of the backbone, to its last feature map.
        backbone: Says where its blocks end.

    Returns:
        A `keras.Model` of the same input and layers to `float32[batch, dim]`: the last feature map's features,
        then those of the levels from early to late.
    """
    import keras

    layers = keras.layers
    most = int(core.output_shape[-1])
    outputs = {operation.name: operation.output for operation in core.operations}
    found = [layers.GlobalAveragePooling2D(dtype="float32", name=f"{LEVEL_PREFIX}last")(core.output)]
    for block in level_blocks(backbone.num_blocks):
        name, tensor = f"{LEVEL_PREFIX}{block}", outputs[backbone.blocks[block]]
        height, width, channels = tensor.shape[1:]
        if min(height, width) < _CELLS or _CELLS**2 * channels > most:
            found.append(layers.GlobalAveragePooling2D(dtype="float32", name=name)(tensor))
            continue
        # An odd side has its middle row in both halves.
        grid = layers.AveragePooling2D(
            (-(-height // _CELLS), -(-width // _CELLS)),
            (height // _CELLS, width // _CELLS),
            dtype="float32",
            name=f"{name}_quarters",
        )(tensor)
        found.append(layers.Flatten(dtype="float32", name=name)(grid))
    return keras.Model(
        core.input, layers.Concatenate(dtype="float32", name=FEATURES_LAYER)(found), name=core.name
    )


def groups_of(core: Any) -> tuple[int, ...]:
    """Return how many features stand together from each level, in order; of a backbone without levels, all.

    Args:
        core: What `with_levels` or `Backbone.build` returned.
    """
    if len(core.output_shape) > 2:  # a feature map
        return (int(core.output_shape[-1]),)
    operation = core.output._keras_history.operation
    return tuple(int(tensor.shape[-1]) for tensor in operation._inbound_nodes[0].input_tensors)


def reads_level(operation: Any) -> bool:
    """Whether an operation averages an earlier level: it has no weights, and belongs to no block."""
    return str(operation.name).startswith(LEVEL_PREFIX)
