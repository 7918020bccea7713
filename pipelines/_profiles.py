"""Variants of the same pipeline function, chosen when it is compiled: on which image and nodes its tasks run.

`compile.py` traces the function once for each profile. What a run can still change are the pipeline's parameters,
whose defaults a profile sets; what KFP does not let a parameter choose, images and volumes, is fixed here.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from components._images import TRAIN_GPU_IMAGE

WORK_DIR = "/workspace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How a pipeline is compiled.

    Attributes:
        suffix: End of the file's and the pipeline's name, so that both variants can be uploaded side by side.
        title: What is added to the pipeline's name in the UI.
        training_image: Image of the training tasks; "" for that of the others.
        accelerator_count: Default of the pipeline's parameter of that name.
        tolerations: Likewise.
        node_selector: Likewise.
        work_claim: PersistentVolumeClaim that every task keeps its work directory on; "" for none.
        secret: Secret whose keys, of `CREDENTIAL_VARIABLES`, are every task's credentials for buckets; "" for none.
    """

    suffix: str = ""
    title: str = ""
    training_image: str = ""
    accelerator_count: int = 0
    tolerations: tuple[Mapping[str, str], ...] = ()
    node_selector: Mapping[str, str] = field(default_factory=dict)
    work_claim: str = ""
    secret: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """Return the defaults of the pipeline's parameters that differ from the function's."""
        values = {
            "accelerator_count": self.accelerator_count,
            "tolerations": [dict(toleration) for toleration in self.tolerations],
            "node_selector": dict(self.node_selector),
        }
        return {name: value for name, value in values.items() if value}


PROFILES = {
    "cpu": Profile(),
    "gpu": Profile(
        suffix="gpu",
        title=", with GPUs",
        training_image=TRAIN_GPU_IMAGE,
        accelerator_count=1,
        # The taint that GPU nodes usually have; without this a task stays pending, and no one says why.
        tolerations=({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},),
    ),
}
_applied = contextvars.ContextVar("profile", default=PROFILES["cpu"])


def profile() -> Profile:
    """Return the profile that is being compiled."""
    return _applied.get()


@contextlib.contextmanager
def applied(chosen: Profile) -> Iterator[None]:
    """Compile with `chosen` within the block."""
    token = _applied.set(chosen)
    try:
        yield
    finally:
        _applied.reset(token)
