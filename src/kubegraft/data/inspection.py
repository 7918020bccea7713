"""Whether a file is an image that training can use: the decode of training itself, and a few facts.

Every file gets a verdict, whatever is in it; `REASONS` are the codes of the bad ones.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kubegraft.data.folders import FoundFile

# Four times the pixels of a usual phone's photograph; decoded, 300 MB.
MAX_PIXELS: Final = 100_000_000
# A record must stay well below protobuf's 2 GiB.
MAX_FILE_BYTES: Final = 512 * 1024 * 1024

REASONS: Final = {
    "empty_file": "The file has no bytes.",
    "not_an_image": "The first bytes are not those of an image, whatever the name says.",
    "unsupported_format": "An image, but not JPEG, PNG, GIF, BMP, WebP or TIFF; convert it.",
    "truncated": "The file ends before the picture does.",
    "undecodable": "The picture's data is damaged.",
    "too_large": f"More than {MAX_PIXELS // 10**6} million pixels or {MAX_FILE_BYTES // 2**20} MiB.",
    "unreadable": "The system would not let the file or folder be read.",
    "symlink_loop": "A symbolic link that leads back to itself or to a folder it lies in.",
    "broken_link": "A symbolic link to something that does not exist.",
    "repeated_folder": "A link to a folder that the class contains already.",
    "not_a_file": "A pipe, socket or device.",
    "system_file": "Hidden, or made by an operating system; not counted as bad.",
    "outside_classes": "No folder says which class it belongs to; not counted as bad.",
}
# What says nothing about the quality of the images.
HARMLESS_REASONS: Final = frozenset({"system_file", "outside_classes"})

_UNSUPPORTED: Final = {
    b"%PDF": "PDF",
    b"8BPS": "Photoshop",
    b"\0\0\1\0": "ICO",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
}
_STACK_LINES: Final = ("Graph execution error", "Detected at node", "File ", "[[{{node")
_LOG_FLUSH_EVERY: Final = 32


@dataclass(frozen=True, slots=True)
class Inspection:
    """Verdict on one file; facts of a good one, or the reason of a bad one.

    Attributes:
        sha256: Digest of the bytes, 64 hex digits; "" for a bad file.
        width: Pixels, after EXIF orientation.
        height: Pixels, after EXIF orientation.
        format: As `kubegraft.data.decode.sniff_format` names it.
        mode: Pillow's name of the pixel format in the file.
        reason: One of `REASONS`, or "" for a good file.
        detail: What the decoder or the system said.
    """

    sha256: str = ""
    width: int = 0
    height: int = 0
    format: str = ""
    mode: str = ""
    reason: str = ""
    detail: str = ""


def inspect_file(location: str) -> Inspection:
    """Return the verdict on a file; never raises for what is in it."""
    from kubegraft.data.decode import sniff_format

    try:
        with open(location, "rb") as file:  # noqa: PTH123 - the name may hold undecodable bytes
            size = os.fstat(file.fileno()).st_size
            head = file.read(16)
            format_ = sniff_format(head)
            if format_ is None:
                return _no_image(head)
            if size > MAX_FILE_BYTES:
                return Inspection(reason="too_large", detail=f"{size / 2**20:.0f} MiB")
            encoded = head + file.read()
    except OSError as error:
        return Inspection(reason="unreadable", detail=os.strerror(error.errno) if error.errno else str(error))
    return _inspect_bytes(encoded, format_)


def _no_image(head: bytes) -> Inspection:
    if not head:
        return Inspection(reason="empty_file", detail="0 bytes")
    for signature, name in _UNSUPPORTED.items():
        if head.startswith(signature):
            return Inspection(reason="unsupported_format", detail=name)
    if head[4:8] == b"ftyp":
        brand = head[8:12].decode("ascii", "replace")
        return Inspection(reason="unsupported_format", detail=f"HEIC, AVIF or video ({brand})")
    return Inspection(reason="not_an_image", detail=f"starts with {head[:12]!r}")


def _inspect_bytes(encoded: bytes, format_: str) -> Inspection:
    from kubegraft.data.decode import decode_bytes

    try:
        mode, num_pixels = read_header(encoded, format_)
        if num_pixels > MAX_PIXELS:
            return Inspection(reason="too_large", detail=f"{num_pixels / 1e6:.0f} million pixels")
        height, width, _ = decode_bytes(encoded).shape
    except Exception as error:  # decoders raise nearly anything on damaged bytes; it is kept
        return _damaged(encoded, format_, error)
    return Inspection(
        sha256=hashlib.sha256(encoded).hexdigest(), width=width, height=height, format=format_, mode=mode
    )


def read_header(encoded: bytes, format_: str) -> tuple[str, int]:
    """Return Pillow's mode, and the number of pixels of the picture, without decoding it.

    Args:
        encoded: Bytes of a whole file.
        format_: As `kubegraft.data.decode.sniff_format` names it.

    Raises:
        Exception: Whatever Pillow raises on damaged bytes; DecompressionBombError for far too many pixels.
    """
    from PIL import Image

    # Phones append more pictures to a JPEG, and Pillow calls it MPO then.
    names = ["JPEG", "MPO"] if format_ == "jpeg" else [format_.upper()]
    with Image.open(io.BytesIO(encoded), formats=names) as image:
        return image.mode, image.width * image.height


def _damaged(encoded: bytes, format_: str, error: Exception) -> Inspection:
    detail = brief(error)
    if type(error).__name__.startswith("DecompressionBomb"):
        return Inspection(reason="too_large", detail=detail)
    ends_early = {
        "jpeg": b"\xff\xd9" not in encoded[-4096:],
        "png": b"IEND" not in encoded[-4096:],
        "gif": not encoded.rstrip(b"\0").endswith(b";"),
        "webp": len(encoded) < 8 + int.from_bytes(encoded[4:8], "little"),
        "bmp": len(encoded) < int.from_bytes(encoded[2:6], "little"),
    }.get(format_, False)
    if ends_early or "runcated" in detail:
        return Inspection(reason="truncated", detail=detail)
    return Inspection(reason="undecodable", detail=detail)


def brief(error: Exception) -> str:
    """Return what an error says, without the graph's stack that TensorFlow puts around it."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(_STACK_LINES)]
    message = re.sub(r"\{\{[^}]*\}\}|\[Op:.*?\]|<_io\.BytesIO[^>]*>", "", said[-1] if said else "")
    return f"{type(error).__name__}: {' '.join(message.split())}"[:300]


class InspectionLog:
    """Verdicts kept on disk, so that an interrupted ingest continues instead of decoding everything again.

    A verdict counts as long as the file's path, size and time of change are the same. A context manager.
    """

    def __init__(self, path: Path) -> None:
        """Read what `path` holds, up to a line that a kill or a power cut has torn, and append to it."""
        self._verdicts: dict[tuple[str, int, int], Inspection] = {}
        self._file = path.open("ab")
        self._file.truncate(self._read(path))
        self._num_unflushed = 0

    def _read(self, path: Path) -> int:
        """Take the verdicts, and return how many bytes hold whole lines."""
        num_bytes = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                values = json.loads(line)
                identity = values["path"], values["size"], values["modified"]
                verdict = Inspection(**values["verdict"])
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            self._verdicts[identity] = verdict
            num_bytes += len(line)
        return num_bytes

    def get(self, file: FoundFile) -> Inspection | None:
        """Return the verdict on a file, or None if there is none."""
        return self._verdicts.get((file.path, file.size, file.modified))

    def add(self, file: FoundFile, verdict: Inspection) -> None:
        """Append the verdict on a file."""
        identity = {"path": file.path, "size": file.size, "modified": file.modified}
        line = json.dumps({**identity, "verdict": dataclasses.asdict(verdict)})
        self._file.write(line.encode() + b"\n")
        self._num_unflushed += 1
        if self._num_unflushed >= _LOG_FLUSH_EVERY:
            self._file.flush()
            self._num_unflushed = 0

    def __enter__(self) -> InspectionLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def inspect_files(files: Iterable[FoundFile], log: InspectionLog) -> Iterator[tuple[FoundFile, Inspection]]:
    """Yield the verdict on each file, in order, using all cores and memory for a few files at a time."""
    num_threads = os.cpu_count() or 1
    waiting: collections.deque[tuple[FoundFile, Future[Inspection] | Inspection]] = collections.deque()

    def finished() -> tuple[FoundFile, Inspection]:
        file, verdict = waiting.popleft()
        if isinstance(verdict, Future):
            verdict = verdict.result()
            if verdict.reason != "unreadable":  # may well be readable at the next try
                log.add(file, verdict)
        return file, verdict

    with warnings.catch_warnings(), ThreadPoolExecutor(num_threads, "inspect") as pool:
        # Pillow warns of what ends as a verdict anyway, or does no harm.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for file in files:
            known = Inspection(reason=file.reason, detail=file.detail) if file.reason else log.get(file)
            waiting.append((file, known or pool.submit(inspect_file, file.location)))
            if len(waiting) >= 8 * num_threads:
                yield finished()
        while waiting:
            yield finished()
