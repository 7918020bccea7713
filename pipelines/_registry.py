"""The pipelines that are compiled, by the name of their file."""

from pipelines.distributed_transfer_learning import distributed_transfer_learning
from pipelines.transfer_learning import transfer_learning

PIPELINES = {
    "transfer_learning": transfer_learning,
    "distributed_transfer_learning": distributed_transfer_learning,
}
