"""Descriptions of pipeline parameters for the KFP UI, taken from the one place that has them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from kubegraft.config import EvaluateConfig, ExportConfig, FineTuneConfig, HeadConfig, IngestConfig

STAGES = {
    "ingest": IngestConfig,
    "head": HeadConfig,
    "fine_tune": FineTuneConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}
STAGE_TITLES = {"head": "Head training", "fine_tune": "Fine-tuning"}
CLUSTER_PARAMETERS = {
    "accelerator_type": "Kubernetes resource name of the accelerators that both training tasks ask for.",
    "accelerator_count": "Accelerators for each training task, which fails at once if it sees fewer; 0 asks for none.",
    "node_selector": 'Labels that nodes of the training tasks must have, for example {"pool": "gpu"}.',
    "tolerations": "Taints that the training tasks tolerate, as a list of Kubernetes tolerations, for example "
    '[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}].',
}


def described(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a pipeline function's docstring an `Args` section with the help text of every parameter."""
    descriptions = parameter_descriptions()
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    arguments = "\n".join(f"        {name}: {descriptions[name]}" for name in names)
    function.__doc__ = f"{function.__doc__}\n\n    Args:\n{arguments}\n    "
    return function


def parameter_descriptions() -> dict[str, str]:
    """Return parameter name -> description, for every field of every stage under both of its names."""
    descriptions = dict(CLUSTER_PARAMETERS)
    for stage, config in STAGES.items():
        for field in dataclasses.fields(config):
            text = field.metadata["help"]
            descriptions.setdefault(field.name, text)
            descriptions[f"{stage}_{field.name}"] = (
                f"{STAGE_TITLES[stage]}: {text}" if stage in STAGE_TITLES else text
            )
    return descriptions
