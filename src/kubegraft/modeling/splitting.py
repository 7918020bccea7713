"""A backbone cut in two at the end of a block: what is frozen runs once, what is trained runs every epoch.

Both halves call the very layers of the whole model, so that training the one trains the other, and nothing
has to be copied back. Where several tensors cross the cut (a cell of NASNet reads the two cells before it; the
head reads levels before it), all of them together are the boundary activations: one flat row for each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kubegraft.errors import ConfigError
from kubegraft.modeling.backbone import Backbone
from kubegraft.modeling.levels import reads_level


@dataclass(frozen=True, slots=True)
class Boundary:
    """What crosses a cut.

    Attributes:
        num_blocks: Blocks after the cut.
        shapes: Shape of each tensor that crosses it, without the batch.
        dtype: What the model computes in: `float32`, `bfloat16` or `float16`.
    """

    num_blocks: int
    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "float32"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of each tensor of one image."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def row_length(self) -> int:
        """Numbers of one image."""
        return sum(self.lengths)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return self.row_length * (4 if self.dtype == "float32" else 2)

    @property
    def shown(self) -> str:
        """The shapes for people, for example `14 x 14 x 112`."""
        return " + ".join(" x ".join(map(str, shape)) for shape in self.shapes)


@dataclass(frozen=True, slots=True)
class SplitBackbone:
    """The two halves of a backbone; they share its layers.

    Attributes:
        prefix: Pixels `float32[batch, size, size, 3]` to the tensors that cross the cut, as a list.
        suffix: Those tensors to what the backbone returns.
        boundary: What crosses.
    """

    prefix: Any
    suffix: Any
    boundary: Boundary

    def activations(self, pixels: Any) -> Any:
        """Return boundary activations `[batch, boundary.row_length]` of images `float32[batch, size, size, 3]`."""
        return pack(self.prefix(pixels, training=False), self.boundary.dtype)

    def on_the_way(self, core: Any) -> Callable[[Any], tuple[Any, Any]]:
        """Return a function from images to what the backbone returns and the boundary activations, in one pass.

        Args:
            core: The whole backbone that was cut.
        """
        import keras

        whole = keras.Model(core.input, [*self.prefix.outputs, core.output])

        def both(pixels: Any) -> tuple[Any, Any]:
            *crossing, last = whole(pixels, training=False)
            return last, pack(crossing, self.boundary.dtype)

        return both

    def outputs(self, rows: Any) -> Any:
        """Return what the backbone returns from boundary activations `[batch, boundary.row_length]`."""
        return self.suffix(unpack(rows, self.boundary), training=False)


def split_backbone(core: Any, backbone: Backbone, num_blocks: int) -> SplitBackbone:
    """Return the halves of a backbone before and after the cut that leaves `num_blocks` blocks behind it.

    Args:
        core: Keras model of the backbone; it is not changed.
        backbone: Says where its blocks end.
        num_blocks: Blocks in the second half, in [1, `backbone.num_blocks`). With all blocks there is no cut.

    Raises:
        ConfigError: If there is no such cut.
    """
    import keras

    tensors = _crossing(core, backbone, num_blocks)
    return SplitBackbone(
        keras.Model(core.input, tensors, name="prefix"),
        keras.Model(tensors, core.output, name="suffix"),
        _boundary(tensors, num_blocks),
    )


def boundary_of(core: Any, backbone: Backbone, num_blocks: int) -> Boundary:
    """Return what crosses the cut before the last `num_blocks` blocks, without cutting; see `split_backbone`."""
    return _boundary(_crossing(core, backbone, num_blocks), num_blocks)


def pack(tensors: Any, dtype: str) -> Any:
    """Return tensors `[batch, ...]` as one row for each image, `[batch, row_length]` of that number format."""
    import tensorflow as tf

    rows = [
        tf.cast(tf.reshape(tensor, (-1, math.prod(tensor.shape[1:]))), dtype) for tensor in _listed(tensors)
    ]
    return rows[0] if len(rows) == 1 else tf.concat(rows, 1)


def unpack(rows: Any, boundary: Boundary) -> list[Any]:
    """Return the tensors `[batch, ...]` that `pack` made the rows of."""
    import tensorflow as tf

    columns = [rows] if len(boundary.lengths) == 1 else tf.split(rows, boundary.lengths, 1)
    return [tf.reshape(column, (-1, *shape)) for column, shape in zip(columns, boundary.shapes, strict=True)]


def _listed(tensors: Any) -> Sequence[Any]:
    return tensors if isinstance(tensors, (list, tuple)) else [tensors]


def _boundary(tensors: Sequence[Any], num_blocks: int) -> Boundary:
    # Averages of levels are float32, but what there is most of decides.
    dtypes = {str(tensor.dtype) for tensor in tensors if len(tensor.shape) > 2}
    shapes = tuple(tuple(int(side) for side in tensor.shape[1:]) for tensor in tensors)
    return Boundary(num_blocks, shapes, dtypes.pop() if len(dtypes) == 1 else "float32")


def _crossing(core: Any, backbone: Backbone, num_blocks: int) -> list[Any]:
    """Return the tensors that are made before the cut and read behind it, in the order in which they are made."""
    if not 1 <= num_blocks < backbone.num_blocks:
        raise ConfigError(
            f"`num_blocks` must be in [1, {backbone.num_blocks - 1}] to cut {backbone.name} in two. Received: "
            f"num_blocks={num_blocks!r}. With all blocks unfrozen no part of the backbone is frozen."
        )
    boundary = backbone.blocks[backbone.num_blocks - num_blocks - 1]
    last = next(op for op in core.operations if op.name == boundary)
    before = _needed_by(last)
    # What averages an earlier level is small; its input, which would cross in its place, is not. From the cut itself
    # it is averaged behind it.
    levels = {id(op): _needed_by(op) for op in core.operations if reads_level(op)}
    before |= {
        level for level, needed in levels.items() if id(last) not in needed and needed - set(levels) <= before
    }
    crossing: dict[int, Any] = {}
    for operation in core.operations:
        if id(operation) in before:
            continue
        for tensor in _first_node(operation).input_tensors:
            if id(tensor._keras_history.operation) in before:
                crossing.setdefault(id(tensor), tensor)
    order = {id(operation): number for number, operation in enumerate(core.operations)}
    return sorted(crossing.values(), key=lambda tensor: order[id(tensor._keras_history.operation)])


def _needed_by(operation: Any) -> set[int]:
    """Return the identities of an operation and of everything that it is computed from."""
    needed: set[int] = set()
    waiting = [operation]
    while waiting:
        current = waiting.pop()
        if id(current) not in needed:
            needed.add(id(current))
            waiting.extend(tensor._keras_history.operation for tensor in _first_node(current).input_tensors)
    return needed


def _first_node(operation: Any) -> Any:
    """Return how an operation was called in the whole model; a half that is cut out calls it again."""
    return operation._inbound_nodes[0]
