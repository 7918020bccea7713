"""Where the blocks of each architecture end: names of Keras operations, in order from the input.

A block is a whole one in the architecture's own sense: a residual unit, an inverted residual, a dense block
with its transition, an Inception module, a cell. The stem belongs to the first block, and what follows the
last boundary (a last convolution, a last norm) to the last block. ConvNeXt ends its blocks with an addition
that is no layer, so these are names of operations, which every layer is too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

VGG: Final = tuple(f"block{block}_pool" for block in range(1, 6))
MOBILENET: Final = tuple(f"conv_pw_{block}_relu" for block in range(1, 14))
INCEPTION_V3: Final = tuple(f"mixed{block}" for block in range(11))
INCEPTION_RESNET_V2: Final = (
    "mixed_5b",
    *(f"block35_{block}_ac" for block in range(1, 11)),
    "mixed_6a",
    *(f"block17_{block}_ac" for block in range(1, 21)),
    "mixed_7a",
    *(f"block8_{block}_ac" for block in range(1, 10)),
    "conv_7b_ac",
)
XCEPTION: Final = (
    "block1_conv2_act",
    "add",
    *(f"add_{block}" for block in range(1, 12)),
    "block14_sepconv2_act",
)
DENSENET: Final = ("pool2_pool", "pool3_pool", "pool4_pool", "relu")
NASNET_MOBILE: Final = (
    "reduction_concat_stem_1",
    "reduction_concat_stem_2",
    *(f"normal_concat_{cell}" for cell in range(4)),
    "reduction_concat_reduce_4",
    *(f"normal_concat_{cell}" for cell in range(5, 9)),
    "reduction_concat_reduce_8",
    *(f"normal_concat_{cell}" for cell in range(9, 13)),
)


def resnet(repeats: Sequence[int]) -> tuple[str, ...]:
    """Return the residual units of a ResNet with `repeats` units in its stages."""
    return tuple(
        f"conv{stage}_block{unit}_out"
        for stage, repeat in enumerate(repeats, start=2)
        for unit in range(1, repeat + 1)
    )


def inverted_residuals(prefixes: Sequence[str], added: Sequence[int], norm: str) -> tuple[str, ...]:
    """Return the ends of inverted residuals.

    Args:
        prefixes: Prefix of each one's layers.
        added: Indices of those that end with their shortcut's addition.
        norm: Suffix of the norm with which the others end.
    """
    return tuple(prefix + ("_add" if index in added else norm) for index, prefix in enumerate(prefixes))


def efficientnet(repeats: Sequence[int], *, first_stage: str | None = None) -> tuple[str, ...]:
    """Return the MBConv blocks of an EfficientNet.

    Args:
        repeats: Blocks in each stage. The first of a stage changes the shape, so it has no shortcut.
        first_stage: Suffix with which `block1a` ends, where it isn't a norm.
    """
    names = []
    for stage, repeat in enumerate(repeats, start=1):
        for index in range(repeat):
            first = first_stage if stage == 1 and first_stage else "_project_bn"
            names.append(f"block{stage}{chr(ord('a') + index)}{'_add' if index else first}")
    return tuple(names)


def convnext(repeats: Sequence[int]) -> tuple[str, ...]:
    """Return the blocks of a ConvNeXt; each but its first starts a stage with a downsampling layer."""
    return tuple(f"add_{index}" if index else "add" for index in range(sum(repeats)))
