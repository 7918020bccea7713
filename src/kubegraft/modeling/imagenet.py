"""Where ImageNet weights are: the file that Keras publishes for a backbone, its hash and its cache.

The hashes are those in Keras 3.15's own sources. The files are fetched by kubegraft rather than by Keras,
for its retries and because Keras draws a progress bar on standard output, which `--json` must have alone.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kubegraft.errors import StorageError, WeightsError

KERAS_FILES: Final = "https://storage.googleapis.com/tensorflow/keras-applications/"
_PROBE_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageNetFile:
    """A weights file that Keras publishes, without the classifier.

    Attributes:
        url: Address; `{size}` stands for the input size where there is a file for each of several.
        file_name: Name in Keras's cache; "" takes the last part of the address.
        file_hash: MD5 or SHA-256, as Keras states it; "" where Keras states none.
        sizes: Input sizes that have a file of their own; other sizes use the last one's.
    """

    url: str
    file_name: str = ""
    file_hash: str = ""
    sizes: tuple[int, ...] = ()

    def for_size(self, input_size: int) -> ImageNetFile:
        """Return the one file for this input size."""
        if not self.sizes:
            return self
        size = input_size if input_size in self.sizes else self.sizes[-1]
        return ImageNetFile(url=self.url.format(size=size), file_hash=self.file_hash)

    @property
    def files(self) -> tuple[ImageNetFile, ...]:
        """The one file, or that of each input size."""
        return tuple(self.for_size(size) for size in self.sizes) or (self,)

    @property
    def cache_path(self) -> Path:
        """Path in Keras's own cache, so that both find what the other has downloaded."""
        return cache_dir() / (self.file_name or self.url.rsplit("/", 1)[-1])


def cache_dir() -> Path:
    """Return Keras's cache of weights: `$KERAS_HOME/models`, else `~/.keras/models`, else under /tmp."""
    home = Path.home()
    base = os.environ.get("KERAS_HOME") or str(
        (home if os.access(home, os.W_OK) else Path(tempfile.gettempdir())) / ".keras"
    )
    return Path(base).expanduser() / "models"


def require_reachable(file: ImageNetFile) -> None:
    """Raise WeightsError unless the file is cached, or its server answers within three seconds."""
    if file.cache_path.exists():
        return
    request = urllib.request.Request(file.url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except (urllib.error.URLError, OSError) as error:
        raise _unreachable(file, error) from error


def fetched(file: ImageNetFile) -> Path:
    """Return the path of the file, downloaded if it is not cached, with its hash checked.

    Raises:
        WeightsError: If it can't be had, or is not the file that Keras published.
    """
    from kubegraft.storage import fetch_file

    path = file.cache_path
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fetch_file(file.url, path)
        except StorageError as error:
            raise _unreachable(file, error) from error
    check_hash(file, path)
    return path


def check_hash(file: ImageNetFile, path: Path) -> None:
    """Raise WeightsError unless `path` holds the file that Keras published; where Keras states no hash, all pass."""
    if not file.file_hash:
        return
    algorithm = "sha256" if len(file.file_hash) == 64 else "md5"
    with path.open("rb") as content:
        actual = hashlib.file_digest(content, algorithm).hexdigest()
    if actual != file.file_hash:
        raise WeightsError(
            f"`weights` must be the file that Keras published: {algorithm} {file.file_hash}. Received: {path} "
            f"with {actual}. Fetch the file again; one in Keras's cache is downloaded anew once it is removed."
        )


def _unreachable(file: ImageNetFile, error: Exception) -> WeightsError:
    return WeightsError(
        f"`weights` 'imagenet' must be downloaded, but the file can't be reached. Received: {file.url}: {error}. "
        f"Put that file at {file.cache_path}, or use weights='none' or the path of a .weights.h5 file; "
        "`kubegraft bundle create` brings such files to where there is no network."
    )
