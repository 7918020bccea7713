"""Options that say where the training tasks go, shared by the commands for clusters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from kubegraft.cli.options import Command, FieldOption

_CLUSTER = "In the cluster"


def option_group(section: str, *declared: tuple[str, dict[str, Any]]) -> Callable[[Command], Command]:
    """Return a decorator that adds options which stand under one heading of the help.

    Args:
        section: The heading.
        declared: The flags as click has them, and the option's attributes.
    """

    def decorate(function: Command) -> Command:
        for flag, attributes in reversed(declared):
            function = click.option(flag, cls=FieldOption, section=section, **attributes)(function)
        return function

    return decorate


cluster_option_group = functools.partial(option_group, _CLUSTER)

_options = cluster_option_group(
    (
        "--accelerator-type",
        {"default": "nvidia.com/gpu", "help": "Resource name of accelerators.  [default: nvidia.com/gpu]"},
    ),
    (
        "--accelerator-count",
        {"default": 0, "metavar": "N", "help": "Accelerators of each training task.  [default: 0]"},
    ),
    (
        "--node-selector",
        {
            "multiple": True,
            "metavar": "LABEL=VALUE",
            "help": "Label of the training tasks' nodes; repeatable.",
        },
    ),
    (
        "--toleration",
        {
            "multiple": True,
            "metavar": "KEY[=VALUE][:EFFECT]",
            "help": "Taint that the training tasks tolerate; repeatable.  [default: the accelerators' own]",
        },
    ),
)


def placement_options(function: Command) -> Command:
    """Add the options, received as one `placement`."""

    @functools.wraps(function)
    def placed(
        *,
        accelerator_type: str,
        accelerator_count: int,
        node_selector: tuple[str, ...],
        toleration: tuple[str, ...],
        **arguments: Any,
    ) -> Any:
        from kubegraft.kfp_client.placement import Placement, parse_selector, parse_toleration

        # The taint that nodes with accelerators usually carry; without it a task stays pending, and no one says why.
        own_taint = (f"{accelerator_type}:NoSchedule",) if accelerator_count else ()
        placement = Placement(
            accelerator_type=accelerator_type,
            accelerator_count=accelerator_count,
            node_selector=dict(map(parse_selector, node_selector)),
            tolerations=tuple(map(parse_toleration, toleration or own_taint)),
        )
        return function(placement=placement, **arguments)

    return _options(placed)
