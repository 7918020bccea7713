"""The only place that names container images."""

import os
import re

from kubegraft import __version__

REGISTRY = os.environ.get("KUBEGRAFT_REGISTRY") or "ghcr.io/kubegraft"
# A whole name, for an image that is tagged by its content while developing (`make images`).
TRAIN_IMAGE = os.environ.get("KUBEGRAFT_TRAIN_IMAGE") or f"{REGISTRY}/kubegraft-train:{__version__}"


def _beside(image: str) -> str:
    """Return the name of the image for GPUs that is built with an image of ours; "" for an image of another name."""
    found = re.sub(r"(?:^|(?<=/))kubegraft-train(?=:[^/]+$)", "kubegraft-train-gpu", image)
    return "" if found == image else found


# Of the training tasks in the GPU profile; the other tasks need no GPU, nor 3 GB of CUDA on their nodes.
TRAIN_GPU_IMAGE = os.environ.get("KUBEGRAFT_TRAIN_GPU_IMAGE") or _beside(TRAIN_IMAGE)
