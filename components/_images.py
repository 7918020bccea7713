"""The only place that names container images."""

import os

from kubegraft import __version__

REGISTRY = os.environ.get("KUBEGRAFT_REGISTRY", "ghcr.io/kubegraft")
TRAIN_IMAGE = f"{REGISTRY}/kubegraft-train:{__version__}"
