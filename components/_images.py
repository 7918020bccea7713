"""The only place that names container images."""

import os

from kubegraft import __version__

REGISTRY = os.environ.get("KUBEGRAFT_REGISTRY") or "ghcr.io/kubegraft"
# A whole name, for an image that is tagged by its content while developing (`make images`).
TRAIN_IMAGE = os.environ.get("KUBEGRAFT_TRAIN_IMAGE") or f"{REGISTRY}/kubegraft-train:{__version__}"
