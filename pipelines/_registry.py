"""The pipelines that are compiled, by the name of their file."""

from pipelines.transfer_learning import transfer_learning

PIPELINES = {"transfer_learning": transfer_learning}
