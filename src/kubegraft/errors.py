"""The exceptions kubegraft raises on purpose, and what a process should do about each.

    KubegraftError                exit 1
    |-- ConfigError               exit 2   an argument or a field of the config file breaks its rule
    |-- DataError                 exit 3   the images, the manifest or a shard can't be used
    |-- ModelError                exit 4   a model directory can't be read or does not fit its dataset
    |   `-- WeightsError          exit 4   pretrained weights are missing, damaged or of another backbone
    |-- TrainingError             exit 5   training can't go on
    |   `-- DivergenceError       exit 5   the loss is not a number
    |-- EvaluationError           exit 6   metrics can't be computed from what was given
    |-- ExportError               exit 7   an export could not be written or does not answer like its model
    |-- StorageError              exit 8   a path or URI could not be read or written      (retryable)
    |-- EnvironmentFault          exit 9   this machine lacks something a stage needs
    |-- ClusterError              exit 10  Kubeflow Pipelines can't be reached, or refuses a call (retryable)
    |-- PeerLost                  exit 75  another worker died, froze or never came                (retryable)
    `-- Interrupted               exit 143 the process was asked to stop and saved a checkpoint (retryable)

Every message follows one form: what is wrong with which field, the rule, what was received, how to fix it.
The exit codes are part of the public interface (docs/errors.md); the CLI and the components turn an
exception into its `exit_code`, and Kubernetes decides by it whether another try makes sense.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class KubegraftError(Exception):
    """Root of all errors raised on purpose.

    Attributes:
        exit_code: Exit status of a process that ends with this error.
        retryable: Whether the same call may succeed later with nothing changed.
    """

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False


class ConfigError(KubegraftError):
    """An argument or a field of the config file breaks its rule."""

    exit_code = 2


class DataError(KubegraftError):
    """The images, the manifest or a shard can't be used."""

    exit_code = 3


class ModelError(KubegraftError):
    """A model directory can't be read, or does not fit the dataset it is used with."""

    exit_code = 4


class WeightsError(ModelError):
    """Pretrained weights are missing, damaged, or belong to another backbone."""


class TrainingError(KubegraftError):
    """Training can't go on."""

    exit_code = 5


class DivergenceError(TrainingError):
    """The loss is not a finite number any more."""


class EvaluationError(KubegraftError):
    """Metrics can't be computed from what was given."""

    exit_code = 6


class ExportError(KubegraftError):
    """An export could not be written, or does not answer like its model."""

    exit_code = 7


class StorageError(KubegraftError):
    """A path or URI could not be read or written.

    Attributes:
        is_missing: Whether the store answered, and has no such object.
    """

    exit_code = 8
    retryable = True
    is_missing = False


class EnvironmentFault(KubegraftError):
    """This machine lacks something that a stage needs."""

    exit_code = 9


class ClusterError(KubegraftError):
    """The API of a cluster can't be reached, or refuses a call.

    Attributes:
        status: HTTP status of the refusal; 0 if there was no answer.
    """

    exit_code = 10
    retryable = True
    status: int = 0


class PeerLost(KubegraftError):
    """Another worker of a distributed training died, froze or never came: all start again."""

    exit_code = 75
    retryable = True


class Interrupted(KubegraftError):
    """The process was asked to stop and saved what it had."""

    exit_code = 143
    retryable = True


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to `name`, or "" when none is near."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return f" Did you mean {by_folded[near[0]]!r}?" if near else ""
