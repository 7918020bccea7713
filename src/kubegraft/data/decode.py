"""The one decoder of training, evaluation and serving: image bytes to `uint8[height, width, 3]`.

JPEG, PNG and GIF are decoded by TensorFlow ops alone, EXIF orientation included, so that a SavedModel can
take raw bytes and see exactly the pixels that training saw. The other formats go through Pillow, which a
SavedModel can't call; `decode_any` is for the stages that run in Python.

The format is told from the first bytes, never from a file's name.
"""

from __future__ import annotations

import io
import re
from typing import Any, Final

import numpy as np
import tensorflow as tf

NATIVE_FORMATS: Final = ("jpeg", "png", "gif")
PILLOW_FORMATS: Final = ("bmp", "webp", "tiff")

_TAG_ORIENTATION: Final = 0x0112
_TYPE_SHORT: Final = 3
_PNG_BITS_OFFSET: Final = 24  # of the header chunk, which comes first
_START_OF_SCAN: Final = 0xDA
_APP1: Final = 0xE1
# Metadata segments come before the picture; a file with more of them than this is read as not rotated.
_MOST_SEGMENTS: Final = 100
# An entry of a TIFF directory, in either byte order, that says anything but upright: tag, type, count, value.
_ROTATING_ENTRY: Final = re.compile(
    rb"\x12\x01\x03\x00....[\x02-\x08](?:\x00|\Z)|\x01\x12\x00\x03....\x00[\x02-\x08]", re.DOTALL
)
_MOST_BYTES_SEARCHED: Final = 2**17


def sniff_format(head: bytes) -> str | None:
    """Return the format that the first 12 bytes of a file announce, or None for none that we read."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    return "bmp" if head.startswith(b"BM") else None


def decode_image(encoded: tf.Tensor) -> tf.Tensor:
    """Return the pixels of a JPEG, PNG or GIF, using TensorFlow ops only.

    JPEG: any colour space, turned upright by its EXIF orientation; equal to Pillow bit for bit. PNG: grey,
    palette, 16 bits (the upper eight are kept); transparency is composited on white. GIF: the first frame.

    Args:
        encoded: Scalar string tensor, the bytes of a whole file.

    Returns:
        `uint8[height, width, 3]`, RGB.

    Raises:
        tf.errors.InvalidArgumentError: When run on bytes that can't be decoded completely.
    """
    head = tf.strings.substr(encoded, 0, 4)
    is_jpeg = tf.equal(tf.strings.substr(encoded, 0, 3), b"\xff\xd8\xff")
    image = tf.cond(
        is_jpeg,
        lambda: _decode_jpeg(encoded),
        lambda: tf.cond(
            tf.equal(head, b"\x89PNG"), lambda: _decode_png(encoded), lambda: _decode_gif(encoded)
        ),
    )
    return tf.ensure_shape(image, [None, None, 3])


def decode_any(encoded: tf.Tensor) -> tf.Tensor:
    """Return the pixels of any format we read: `decode_image`, and Pillow for BMP, WebP and TIFF.

    Args:
        encoded: Scalar string tensor, the bytes of a whole file.

    Returns:
        `uint8[height, width, 3]`, RGB.

    Raises:
        tf.errors.OpError: When run on bytes that can't be decoded completely.
    """
    head = tf.strings.substr(encoded, 0, 4)
    needs_pillow = tf.reduce_any(tf.equal(head, [b"RIFF", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"]))
    needs_pillow |= tf.equal(tf.strings.substr(encoded, 0, 2), b"BM")
    image = tf.cond(
        needs_pillow,
        lambda: tf.numpy_function(_decode_array_with_pillow, [encoded], tf.uint8, stateful=False),
        lambda: decode_image(encoded),
    )
    return tf.ensure_shape(image, [None, None, 3])


def decode_bytes(encoded: bytes) -> np.ndarray[Any, Any]:
    """Return what `decode_any` returns, for bytes in Python.

    Returns:
        `uint8[height, width, 3]`, RGB.

    Raises:
        Exception: tf.errors.OpError, OSError or what else Pillow raises, if they can't be decoded completely.
    """
    if sniff_format(encoded[:12]) in PILLOW_FORMATS:
        return decode_with_pillow(encoded)
    if _is_upright_jpeg(encoded):
        return np.asarray(_jpeg_pixels(encoded))
    return np.asarray(_compiled_decode_image(encoded))


def _is_upright_jpeg(encoded: bytes) -> bool:
    """Return whether this is a small JPEG that has no EXIF orientation but upright, for sure.

    To read its orientation by TensorFlow's operations takes longer than to decode the picture.
    """
    return (
        len(encoded) <= _MOST_BYTES_SEARCHED
        and encoded.startswith(b"\xff\xd8\xff")
        and not _ROTATING_ENTRY.search(encoded)
    )


@tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
def _compiled_decode_image(encoded: tf.Tensor) -> tf.Tensor:
    return decode_image(encoded)


def _decode_array_with_pillow(encoded: Any) -> np.ndarray[Any, Any]:
    """Decode what `numpy_function` passes: bytes in a graph, an array of them in eager mode."""
    return decode_with_pillow(encoded if isinstance(encoded, bytes) else encoded.item())


def decode_with_pillow(encoded: bytes) -> np.ndarray[Any, Any]:
    """Return `uint8[height, width, 3]` of a BMP, WebP or TIFF; the first frame, upright, on white.

    Raises:
        Exception: OSError or what else Pillow raises, if the bytes can't be decoded completely.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(encoded), formats=[name.upper() for name in PILLOW_FORMATS]) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        return _scaled_to_uint8(np.asarray(upright))
    if not upright.has_transparency_data:
        return np.asarray(upright.convert("RGB"))
    rgba = np.asarray(upright.convert("RGBA")).astype(np.uint16)
    alpha = rgba[..., 3:]
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _scaled_to_uint8(grey: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return 16-bit values by their upper eight bits, and floats as fractions of white."""
    if grey.dtype.kind == "f":
        scaled = np.nan_to_num(np.clip(grey, 0.0, 1.0), nan=0.0) * 255.0 + 0.5
    else:
        scaled = np.clip(grey.astype(np.int64), 0, 65535) >> 8
    return np.repeat(scaled.astype(np.uint8)[..., np.newaxis], 3, axis=-1)


def _decode_jpeg(encoded: tf.Tensor) -> tf.Tensor:
    pixels = _jpeg_pixels(encoded)
    orientation = exif_orientation(encoded)
    return tf.cond(tf.equal(orientation, 1), lambda: pixels, lambda: turn_upright(pixels, orientation))


def _jpeg_pixels(encoded: tf.Tensor | bytes) -> tf.Tensor:
    """Return the pixels as they are stored."""
    # INTEGER_ACCURATE is libjpeg's own default and Pillow's; TensorFlow's default is faster and coarser.
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE", try_recover_truncated=False)


def _decode_png(encoded: tf.Tensor) -> tf.Tensor:
    rgba = tf.io.decode_png(encoded, channels=4)
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    # TensorFlow gives an image without transparency the alpha 2**bits - 1, also if it has less than 8 bits.
    bits = tf.minimum(_bytes_at(encoded, tf.constant(_PNG_BITS_OFFSET), 1)[0], 8)
    opaque = tf.cast(tf.bitwise.left_shift(1, bits) - 1, tf.uint8)
    is_opaque = tf.reduce_all(tf.equal(alpha, opaque))
    return tf.cond(is_opaque, lambda: rgb, lambda: _on_white(rgb, alpha))


def _on_white(rgb: tf.Tensor, alpha: tf.Tensor) -> tf.Tensor:
    rgb, alpha = tf.cast(rgb, tf.int32), tf.cast(alpha, tf.int32)
    return tf.cast((rgb * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)


def _decode_gif(encoded: tf.Tensor) -> tf.Tensor:
    """Decode a GIF; bytes of no known format end here too and raise."""
    return tf.io.decode_image(encoded, channels=3, expand_animations=False)


def turn_upright(pixels: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Return `pixels` as the camera saw them.

    Args:
        pixels: `uint8[height, width, 3]` as stored.
        orientation: Scalar int32, EXIF tag 0x0112, in [1, 8].

    Returns:
        `uint8[height, width, 3]`, or with height and width exchanged for orientations 5 to 8.
    """

    def among(*values: int) -> tf.Tensor:
        return tf.reduce_any(tf.equal(orientation, tf.constant(values)))

    pixels = tf.cond(among(5, 6, 7, 8), lambda: _transposed(pixels), lambda: pixels)
    pixels = tf.cond(among(2, 3, 6, 7), lambda: tf.reverse(pixels, [1]), lambda: pixels)
    return tf.cond(among(3, 4, 7, 8), lambda: tf.reverse(pixels, [0]), lambda: pixels)


def _transposed(pixels: tf.Tensor) -> tf.Tensor:
    """Exchange height and width; TensorFlow's transpose of uint8 prints an error of oneDNN's on many CPUs."""
    height, width = tf.shape(pixels)[0], tf.shape(pixels)[1]
    positions = tf.range(width)[:, tf.newaxis] + width * tf.range(height)[tf.newaxis, :]
    return tf.gather(tf.reshape(pixels, [-1, 3]), positions)


def exif_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """Return the EXIF orientation of a JPEG, using TensorFlow ops only.

    Args:
        encoded: Scalar string tensor, the bytes of a JPEG file.

    Returns:
        Scalar int32 in [1, 8]; 1 where there is none or it is damaged.

    Source:
        CIPA DC-008 (Exif 2.32), 4.5 and 4.6; TIFF 6.0, section 2.
    """
    start, size = _find_exif(encoded)
    return tf.cond(
        size > 0, lambda: _orientation_of_tiff(_bytes_at(encoded, start, size)), lambda: tf.constant(1)
    )


def _bytes_at(encoded: tf.Tensor, start: tf.Tensor, size: tf.Tensor | int) -> tf.Tensor:
    """Return `int32[size]`: bytes from `start`, zeros beyond the end (`substr` itself raises out there)."""
    length = tf.strings.length(encoded)
    inside = tf.clip_by_value(start, 0, length)
    values = tf.cast(tf.io.decode_raw(tf.strings.substr(encoded, inside, size), tf.uint8), tf.int32)
    return tf.pad(values, [[0, size - tf.size(values)]])


def _find_exif(encoded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Walk the segments before the picture; return start and size of the Exif data, size 0 for none."""
    signature = tf.constant(list(b"Exif\0\0"), tf.int32)

    def step(position: tf.Tensor, start: tf.Tensor, size: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, ...]:
        head = _bytes_at(encoded, position, 10)
        marker = head[1]
        is_padding = tf.equal(marker, 0xFF)
        length = head[2] * 256 + head[3]
        is_exif = tf.equal(marker, _APP1) & tf.reduce_all(tf.equal(head[4:], signature)) & (length > 8)
        goes_on = (
            tf.equal(head[0], 0xFF) & ~is_exif & (is_padding | ((length >= 2) & (marker != _START_OF_SCAN)))
        )
        return (
            position + tf.where(is_padding, 1, 2 + length),
            tf.where(is_exif, position + 10, start),
            tf.where(is_exif, length - 8, size),
            goes_on,
        )

    first = (tf.constant(2), tf.constant(0), tf.constant(0), tf.constant(True))
    _, start, size, _ = tf.while_loop(
        lambda *state: state[3], step, first, maximum_iterations=_MOST_SEGMENTS, parallel_iterations=1
    )
    return start, size


def _orientation_of_tiff(tiff: tf.Tensor) -> tf.Tensor:
    """Return the orientation in `int32[size]`, the bytes of a TIFF structure; 1 for none or nonsense."""
    size = tf.size(tiff)
    padded = tf.pad(tiff, [[0, 16]])
    is_little = tf.reduce_all(tf.equal(padded[:2], list(b"II")))
    is_tiff = is_little | tf.reduce_all(tf.equal(padded[:2], list(b"MM")))

    def number(values: tf.Tensor) -> tf.Tensor:
        """Read 16-bit numbers from the last axis."""
        return tf.where(
            is_little, values[..., 1] * 256 + values[..., 0], values[..., 0] * 256 + values[..., 1]
        )

    # A segment has less than 64 KiB, so an offset that needs its upper half points outside.
    upper, lower = number(padded[4:6]), number(padded[6:8])
    upper, lower = tf.where(is_little, lower, upper), tf.where(is_little, upper, lower)
    directory = tf.where((upper > 0) | (lower < 8) | (lower > size), size, lower)
    num_entries = tf.minimum(number(padded[directory : directory + 2]), (size - directory - 2) // 12)
    num_entries = tf.where(is_tiff, tf.maximum(num_entries, 0), 0)
    entries = tf.reshape(padded[directory + 2 : directory + 2 + 12 * num_entries], [num_entries, 12])
    is_orientation = tf.equal(number(entries[:, 0:2]), _TAG_ORIENTATION)
    is_orientation &= tf.equal(number(entries[:, 2:4]), _TYPE_SHORT)
    values = tf.where(is_orientation, number(entries[:, 8:10]), 0)
    orientation = tf.reduce_max(tf.concat([[0], values], axis=0))
    return tf.where((orientation >= 1) & (orientation <= 8), orientation, 1)
