"""Reading and writing files and folders by path or URI: local, `file://`, `http(s)://`, `gs://` and `s3://`.

What the rest of kubegraft imports is named here; the modules below are:

    uris        what a URI names, and how it may be shown
    retries     trying again what fails for a while, and hiding what must not be printed
    digests     checksums of files
    objects     what an object store must do; `gcs` and `s3` do it, `web` reads http(s)
    fetching    fetch_file, fetch_tree, fetch_whole_tree: from anywhere to here
    listing     list_files, exists
    publishing  publish_tree: from here to a path or bucket, all or nothing

A fetched file appears under its name only when it is whole and has the checksum that the store gave. What fails
for a while (a dropped connection, a busy server) is tried again here, because Kubernetes does not start a step
again that exits. Credentials are found by the clients of the stores, never passed through kubegraft.
"""

from kubegraft.storage.digests import sha256_of
from kubegraft.storage.fetching import fetch_file, fetch_tree, fetch_whole_tree
from kubegraft.storage.listing import exists, list_files
from kubegraft.storage.publishing import check_target, publish_tree
from kubegraft.storage.retries import RETRY_WAITS_SECONDS
from kubegraft.storage.uris import SCHEMES, is_remote, local_path, public_uri

__all__ = [
    "RETRY_WAITS_SECONDS",
    "SCHEMES",
    "check_target",
    "exists",
    "fetch_file",
    "fetch_tree",
    "fetch_whole_tree",
    "is_remote",
    "list_files",
    "local_path",
    "public_uri",
    "publish_tree",
    "sha256_of",
]
