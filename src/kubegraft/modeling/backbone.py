"""What kubegraft knows about one backbone, and how its model is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from kubegraft.errors import ConfigError
from kubegraft.modeling.imagenet import ImageNetFile

# Name -> (scale, offset, whether channels become blue, green, red); None: the architecture has its own layers.
PREPROCESSING: Final[dict[str, tuple[Any, Any, bool] | None]] = {
    "tf": (1 / 127.5, -1.0, False),
    "torch": (
        [1 / (255 * deviation) for deviation in (0.229, 0.224, 0.225)],
        [-mean / deviation for mean, deviation in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))],
        False,
    ),
    "caffe": ([1.0, 1.0, 1.0], [-103.939, -116.779, -123.68], True),
    "lite": (1 / 128, -127 / 128, False),
    "inside": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A pretrained feature extractor without its classifier.

    Attributes:
        name: Canonical name, lower case.
        display_name: Name of the constructor in `keras.applications`; its own name where Keras has none.
        native_input_size: Side in pixels at which it was pretrained.
        min_input_size: Smallest side that the architecture takes; every larger one is accepted too.
        preprocessing: Key of `PREPROCESSING`: what the weights expect; it is inside the model.
        blocks: Names of the operations that end each block, in order from the input; what follows the last
            belongs to the last block, and the stem to the first.
        clean_cuts: Whether the graph can be cut at every boundary. NASNet's can't: a cell reads the outputs of
            the two cells before it.
        num_parameters: Parameters, batch-norm statistics included.
        license: SPDX identifier of the license of the ImageNet weights.
        source: Address of the paper.
        imagenet: File of ImageNet weights, or None where a package holds them.
    """

    name: str
    display_name: str
    native_input_size: int
    min_input_size: int = 32
    preprocessing: str
    blocks: tuple[str, ...]
    clean_cuts: bool = True
    num_parameters: int
    license: str
    source: str
    imagenet: ImageNetFile | None = None

    @property
    def num_blocks(self) -> int:
        """Number of blocks that can be unfrozen one by one."""
        return len(self.blocks)

    def accepted_input_size(self, wanted: int) -> int:
        """Return the accepted side in pixels nearest to `wanted` and not smaller than it."""
        return max(wanted, self.min_input_size)

    def check_input_size(self, input_size: int) -> None:
        """Raise ConfigError unless the architecture takes images of this side in pixels."""
        if input_size < self.min_input_size:
            raise ConfigError(
                f"`input_size` must be at least {self.min_input_size} for {self.name}. Received: "
                f"input_size={input_size!r}. Its weights come from images of {self.native_input_size} pixels."
            )

    def check_num_blocks(self, num_blocks: int) -> None:
        """Raise ConfigError if there are not as many blocks to unfreeze."""
        if num_blocks > self.num_blocks:
            raise ConfigError(
                f"`num_blocks` must be at most {self.num_blocks} for {self.name}. Received: "
                f"num_blocks={num_blocks!r}. {self.num_blocks} unfreezes the whole backbone."
            )

    def constructor(self) -> Any:
        """Return the function that makes the Keras model; imports Keras."""
        import keras

        from kubegraft.modeling.efficientnet_lite0 import efficientnet_lite0

        return (
            efficientnet_lite0
            if self.preprocessing == "lite"
            else getattr(keras.applications, self.display_name)
        )

    def build(
        self, input_size: int, weights: str = "none", *, weights_sha256: str = "", seed: int = 0
    ) -> Any:
        """Return the model, from pixels to its last feature map.

        Args:
            input_size: Side of its input in pixels.
            weights: `imagenet`, `none` (random), or a path or URI of a `.weights.h5` or `.keras` file.
            weights_sha256: Expected SHA-256 of that file; "" skips the check.
            seed: Seed of random weights; the same seed gives the same weights.

        Returns:
            A `keras.Model`, `float32[batch, input_size, input_size, 3]` (RGB, 0 to 255) to
            `float32[batch, height, width, channels]`, named by the backbone. Preprocessing is inside.

        Raises:
            ConfigError: If the architecture does not take this size.
            WeightsError: If the weights can't be had, or are another backbone's.
        """
        import keras

        from kubegraft.modeling.construction import repeatable
        from kubegraft.modeling.weights import load_weights

        self.check_input_size(input_size)
        with repeatable(seed):
            pixels = keras.Input((input_size, input_size, 3), name="pixels")
            made = self.constructor()(
                include_top=False,
                weights=None,
                input_tensor=_preprocessed(pixels, PREPROCESSING[self.preprocessing]),
                input_shape=(input_size, input_size, 3),
            )
        # Keras's constructors take their input as a list of one, and would warn when called with a tensor.
        model = keras.Model(pixels, made.output, name=self.name)
        load_weights(self, model, weights, weights_sha256)
        return model

    def block_of_layer(self, model: Any) -> dict[str, int]:
        """Return the block of every layer of a model of this backbone; see `boundaries`."""
        import keras

        outputs = {operation.name: operation.output for operation in model.operations}
        blocks = dict.fromkeys((layer.name for layer in model.layers), self.num_blocks - 1)
        # Backwards: what the boundary of an earlier block needs is taken from the later ones.
        for block in reversed(range(self.num_blocks - 1)):
            needed = keras.Model(model.inputs, outputs[self.blocks[block]])
            blocks.update(dict.fromkeys((layer.name for layer in needed.layers), block))
        return blocks


def _preprocessed(pixels: Any, rule: tuple[Any, Any, bool] | None) -> Any:
    import keras

    if rule is None:
        return pixels
    scale, offset, is_bgr = rule
    if is_bgr:
        pixels = keras.ops.flip(pixels, axis=-1)
    # float32 in mixed precision too: bfloat16 can't tell 255 from 254.
    return keras.layers.Rescaling(scale, offset, dtype="float32", name="preprocess")(pixels)
