import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from kubegraft import tensorflow_setup  # noqa: F401 - before tensorflow
from kubegraft.data.decode import (
    _is_upright_jpeg,
    decode_any,
    decode_bytes,
    decode_image,
    exif_orientation,
    sniff_format,
)

import tensorflow as tf  # isort: skip

RANDOM = np.random.default_rng(0)
PICTURE = Image.fromarray(RANDOM.integers(0, 256, (5, 7, 3), np.uint8)).resize((70, 50))


def encoded(image, format_, **options):
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def rotated_jpeg(orientation, endian="<"):
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F] = "A camera"
    exif[0x0112] = orientation
    return encoded(PICTURE, "JPEG", exif=exif.tobytes())


def png_of(depth, colour_type, row, *chunks):
    """Return an 8 x 1 PNG of a kind that Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 1, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("endian", ["<", ">"], ids=["little-endian", "big-endian"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_a_jpeg_as_pillow_does(orientation, endian):
    jpeg = rotated_jpeg(orientation, endian)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg))))
    np.testing.assert_array_equal(decode_bytes(jpeg), upright)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_leaves_the_picture(orientation):
    assert decode_bytes(rotated_jpeg(orientation)).shape == (50, 70, 3)


def test_orientation_is_found_behind_large_segments():
    jpeg = rotated_jpeg(6)
    comment = b"\xff\xfe" + struct.pack(">H", 65000) + b"x" * 64998
    jpeg = jpeg[:2] + 2 * comment + b"\xff" + jpeg[2:]  # a padding byte before a marker is allowed
    assert int(exif_orientation(tf.constant(jpeg))) == 6


def test_damaged_exif_never_raises_and_stays_in_range():
    orientation_of = tf.function(
        exif_orientation, input_signature=[tf.TensorSpec([], tf.string)], autograph=False
    )
    original = rotated_jpeg(6)
    for trial in range(400):
        damaged = bytearray(original)
        for _ in range(1 + trial % 5):
            damaged[RANDOM.integers(2, 90)] = RANDOM.integers(0, 256)
        end = RANDOM.integers(0, 120) if trial % 2 else len(damaged)
        damaged = bytes(damaged[:end])
        assert 1 <= int(orientation_of(damaged)) <= 8
        if _is_upright_jpeg(damaged):  # then it is not read
            assert int(orientation_of(damaged)) == 1
    assert int(orientation_of(b"")) == 1


@pytest.mark.parametrize(
    ("mode", "format_", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("L", "PNG", {}),
        ("P", "PNG", {}),
        ("1", "PNG", {}),
        ("P", "GIF", {}),
        ("RGB", "BMP", {}),
        ("P", "BMP", {}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGB", "WEBP", {}),
        ("RGB", "TIFF", {}),
        ("CMYK", "TIFF", {}),
        ("1", "TIFF", {}),
        ("P", "TIFF", {"compression": "tiff_lzw"}),
    ],
    ids=lambda value: str(value),
)
def test_pixels_equal_pillows(mode, format_, options):
    data = encoded(PICTURE.convert(mode), format_, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_bytes(data), expected)
    np.testing.assert_array_equal(decode_any(tf.constant(data)), expected)


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(format_, mode):
    alpha = Image.fromarray(RANDOM.integers(0, 256, (50, 70), np.uint8))
    image = PICTURE.convert(mode)
    image.putalpha(alpha)
    data = encoded(image, format_, **({"lossless": True, "exact": True} if format_ == "WEBP" else {}))
    white = Image.new("RGBA", image.size, "white")
    expected = np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"), np.int32)
    assert np.abs(decode_bytes(data).astype(np.int32) - expected).max() <= 1


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_eight(format_):
    values = RANDOM.integers(0, 65536, (9, 8)).astype(np.uint16)
    pixels = decode_bytes(encoded(Image.fromarray(values), format_))
    np.testing.assert_array_equal(pixels, np.repeat((values >> 8)[..., None], 3, axis=-1))


@pytest.mark.parametrize(
    ("png", "first"),
    [
        (png_of(1, 0, bytes([0b10110001])), [255, 0, 255, 255]),
        (png_of(2, 0, bytes([0b00011011] * 2)), [0, 85, 170, 255]),
        (png_of(4, 0, bytes([0x01, 0x23, 0xEF, 0x80])), [0, 17, 34, 51]),
        (png_of(1, 3, bytes([0b10110001]), (b"PLTE", bytes([9, 9, 9, 200, 200, 200]))), [200, 9, 200, 200]),
        (png_of(8, 0, bytes(range(0, 240, 30)), (b"tRNS", b"\0\x1e")), [0, 255, 60, 90]),
        (png_of(16, 0, bytes(range(16))), [0, 2, 4, 6]),
    ],
    ids=["grey-1-bit", "grey-2-bit", "grey-4-bit", "palette-1-bit", "grey-transparent-colour", "grey-16-bit"],
)
def test_unusual_pngs(png, first):
    assert decode_bytes(png)[0, :4, 0].tolist() == first


def test_a_gif_shows_its_first_frame():
    frames = [Image.new("RGB", (12, 9), colour) for colour in ("red", "green", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_bytes(gif).shape == (9, 12, 3)
    assert (decode_bytes(gif) == [255, 0, 0]).all()


def test_a_tiff_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_bytes(encoded(PICTURE, "TIFF", exif=exif)).shape == (70, 50, 3)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_truncated_file_is_refused(format_):
    data = encoded(PICTURE, format_)
    for end in (len(data) // 3, len(data) // 2, len(data) - 20):
        with pytest.raises((tf.errors.OpError, OSError, SyntaxError, ValueError)):
            decode_bytes(data[:end])


def test_a_batch_of_strings_decodes_inside_a_saved_model(tmp_path):
    def serve(images):
        small = lambda one: tf.image.resize(decode_image(one), (6, 6))  # noqa: E731
        return tf.map_fn(small, images, fn_output_signature=tf.TensorSpec([6, 6, 3], tf.float32))

    module = tf.Module()
    module.serve = tf.function(serve, input_signature=[tf.TensorSpec([None], tf.string)])
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    images = [rotated_jpeg(6), encoded(PICTURE.convert("P"), "PNG"), encoded(PICTURE, "GIF")]
    answers = loaded.serve(tf.constant(images))
    for data, answer in zip(images, answers, strict=True):
        np.testing.assert_allclose(answer, tf.image.resize(decode_bytes(data), (6, 6)), atol=1e-3)


def test_formats_are_told_by_their_bytes():
    for name in ("jpeg", "png", "gif", "bmp", "webp", "tiff"):
        assert sniff_format(encoded(PICTURE, name.upper())[:12]) == name
    assert sniff_format(b"hello world!") is None
    assert sniff_format(b"") is None
