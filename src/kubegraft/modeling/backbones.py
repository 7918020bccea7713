"""The registry of backbones: looked up by name, shown as a table. Importing it does not import TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from kubegraft.errors import ConfigError, suggestion
from kubegraft.modeling.backbone import Backbone
from kubegraft.modeling.catalogue import CATALOGUE

__all__ = ["BACKBONES", "Backbone", "backbone_table", "block_of_layer", "get_backbone"]

BACKBONES: Final[Mapping[str, Backbone]] = MappingProxyType(
    {backbone.name: backbone for backbone in CATALOGUE}
)
_BY_FOLDED: Final = {name.replace("_", ""): backbone for name, backbone in BACKBONES.items()}


def get_backbone(name: str) -> Backbone:
    """Return the backbone of this name; case, `_` and `-` do not count, so `ResNet50` finds `resnet50`.

    Raises:
        ConfigError: If there is none.
    """
    backbone = _BY_FOLDED.get(name.casefold().replace("_", "").replace("-", "").strip())
    if backbone is None:
        raise ConfigError(
            f"`backbone` must be the name of a backbone that kubegraft knows. Received: backbone={name!r}."
            f"{suggestion(name, BACKBONES)} `kubegraft backbones` lists all."
        )
    return backbone


def block_of_layer(backbone: Backbone, model: Any) -> dict[str, int]:
    """Return layer name -> block in [0, `backbone.num_blocks`) for every layer of a model of `backbone`."""
    return backbone.block_of_layer(model)


def backbone_table() -> list[dict[str, str | int]]:
    """Return a row for each backbone: `name`, `num_parameters`, `input_size`, `weights`, `license`, `source`.

    `weights` says where ImageNet weights come from on this machine; see `weights_available`.
    """
    from kubegraft.modeling.weights import weights_available

    return [
        {
            "name": backbone.name,
            "num_parameters": backbone.num_parameters,
            "input_size": backbone.native_input_size,
            "weights": weights_available(backbone),
            "license": backbone.license,
            "source": backbone.source,
        }
        for backbone in BACKBONES.values()
    ]
