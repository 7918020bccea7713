"""What a run in a cluster is told, checked before anything is made: pods must be able to read it, and so may others.

Parameters of Kubeflow, ConfigMaps and arguments of containers are shown in UIs, specifications and logs, so that none
of them may hold a secret.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from kubegraft.errors import ConfigError
from kubegraft.run_config import RunConfig
from kubegraft.storage.uris import (
    OBJECT_SCHEMES,
    bucket_and_key,
    is_remote,
    known_scheme,
    public_uri,
    scheme_of,
)

_NAMED_WEIGHTS: Final = ("imagenet", "none")
# Names of query parameters that give access: of signed URLs of the large clouds, and what others call theirs.
_SECRET: Final = re.compile(
    r"signature|credential|token|secret|passw|api_?key|^sig$|^key$|^auth", re.IGNORECASE
)


def check_inputs(run_config: RunConfig, *, on_volume: bool) -> None:
    """Raise what would stop a run in a cluster later, as far as its config can tell.

    Args:
        run_config: As for a local run.
        on_volume: Whether the pod has a volume, on which an absolute path may be.

    Raises:
        ConfigError: If the backbone is unknown, the images or weights are where no pod can read them, or their
            URI holds a secret.
    """
    from kubegraft.modeling.backbones import get_backbone

    _check_readable("source", run_config.ingest.source, on_volume=on_volume)
    if run_config.head.weights not in _NAMED_WEIGHTS:
        _check_readable("weights", run_config.head.weights, on_volume=on_volume)
    get_backbone(run_config.head.backbone)


def _check_readable(name: str, value: str, *, on_volume: bool) -> None:
    if is_remote(value):
        check_public(name, value)
        if scheme_of(value) != "sample":
            known_scheme(value)
        return
    if scheme_of(value) == "file":
        return
    if not on_volume:
        raise ConfigError(
            f"`{name}` must be a URI that pods can read: gs://, s3://, https:// or sample://. Received: "
            f"{name}={value!r}, a path on this machine. Copy it to a bucket; file:///path means a path in "
            "the image."
        )
    if not value.startswith("/"):
        raise ConfigError(
            f"`{name}` must be a URI or an absolute path in the pod, such as /workspace/photos on the volume. "
            f"Received: {name}={value!r}."
        )


def check_public(name: str, uri: str) -> None:
    """Raise if a URI holds a password or a signature, which specifications and logs of a cluster would show.

    Raises:
        ConfigError: If it does; the message does not repeat it.
    """
    parts = urlsplit(uri)
    secrets = parts.scheme in ("http", "https") and any(
        _SECRET.search(key) for key, _ in parse_qsl(parts.query, keep_blank_values=True)
    )
    if "@" in parts.netloc or secrets:
        raise ConfigError(
            f"`{name}` must hold no user name, password or signature: parameters, manifests and logs show it. "
            f"Received: {name}={public_uri(uri)!r}, and one with it. Copy the data to a bucket that the pods' "
            "service account, or a Secret's keys, may read."
        )


def check_bucket_folder(name: str, uri: str) -> None:
    """Raise unless `uri` names a folder in a bucket, without any secret.

    Raises:
        ConfigError: If it does not.
    """
    if scheme_of(uri) not in OBJECT_SCHEMES:
        raise ConfigError(
            f"`{name}` must be a gs:// or s3:// URI of a folder. Received: {name}={public_uri(uri)!r}. "
            "For example gs://bucket/folder."
        )
    check_public(name, uri)
    bucket_and_key(uri)
