"""Images are the same to the last bit, whoever decodes them: `tf.data`, or the threads of an engine."""

import threading

import numpy as np
import pytest
from PIL import Image

from kubegraft import tensorflow_setup  # noqa: F401 - before tensorflow
from kubegraft.config import IngestConfig
from kubegraft.data.ingest import ingest
from kubegraft.data.manifest import load_manifest
from kubegraft.data.shards import SplitReader
from kubegraft.errors import DataError
from kubegraft.training import features
from kubegraft.training.batches import epoch_batches
from kubegraft.training.features import engine_rows
from kubegraft.training.sources import ImageSource
from tests.conftest import draw_image

SIZE = 32
KINDS = [
    (30, "JPEG"),
    (32, "JPEG"),
    (77, "JPEG"),
    (20, "PNG"),
    (50, "PNG"),
    (24, "BMP"),
    (24, "WEBP"),
    (9, "GIF"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Images of all kinds, larger and smaller than the network's, and JPEGs in all orientations."""
    root = tmp_path_factory.mktemp("data")
    for split, first in (("train", 0), ("validation", 100)):
        for class_number in range(2):
            folder = root / "images" / split / f"class_{class_number}"
            folder.mkdir(parents=True)
            for number, (size, format_) in enumerate(KINDS):
                image = draw_image(class_number, first + number, size).resize((size + 5, size))
                image.save(folder / f"{number}.{format_.lower()}", format_)
            for orientation in range(1, 9):
                exif = Image.Exif()
                exif[0x0112] = orientation
                image = draw_image(class_number, first + 50 + orientation, 28).resize((31, 20))
                image.save(folder / f"turned-{orientation}.jpg", exif=exif.tobytes())
    ingest(root / "dataset", IngestConfig(source=str(root / "images")))
    return root / "dataset"


@pytest.fixture
def reader(dataset):
    with SplitReader(dataset, load_manifest(dataset), "train") as reader:
        yield reader


@pytest.mark.parametrize(("transforms", "num_views"), [((), 0), ((), 2), (("crop", "rotation"), 1)])
def test_an_engines_threads_see_what_training_sees(reader, transforms, num_views):
    source = ImageSource(reader, SIZE, transforms, 0.7, num_views)
    assert source.can_write
    batches = epoch_batches(source.labels, batch_size=8, seed=0, epoch=0, shuffle=False)
    expected = np.concatenate(list(source.inputs(batches, slice(None), slice(None), 8).as_numpy_iterator()))
    assert len(source.labels) == len(reader) * max(num_views, 1)
    for number in range(len(source.labels)):
        written = np.empty(source.shape, np.float32)
        source.write(written, number)
        path = str(reader.paths[number % len(reader)])
        np.testing.assert_array_equal(written, expected[number], err_msg=path)


def test_varied_images_come_from_one_place(reader):
    assert not ImageSource(reader, SIZE, ("rotation",), 0.7, 2).can_write
    assert not ImageSource(reader, SIZE, ("rotation",), 0.7).can_write


class Engine:
    name, digest, batch_size, num_workers = "engine", "d" * 64, 8, 2

    def forward(self, images):
        return images.mean((1, 2))


@pytest.mark.parametrize("num_processors", [2, 64], ids=["the engine's threads", "tf.data"])
@pytest.mark.parametrize(
    "content", [b"\xff\xd8\xff\xe0 no picture", b"RIFF....WEBP no picture", b"\x89PNG no picture"]
)
def test_what_can_not_be_decoded_is_an_error_of_the_data(reader, monkeypatch, num_processors, content):
    monkeypatch.setattr(features, "usable_processors", lambda: num_processors)
    monkeypatch.setattr(reader, "_verified", lambda index: content)
    source = ImageSource(reader, SIZE)
    batches = epoch_batches(source.labels, batch_size=8, seed=0, epoch=0, shuffle=False)
    with pytest.raises(DataError, match="`train` split must be readable"), source.reading():
        list(engine_rows(Engine(), source, batches))


def test_a_few_images_are_shared_among_the_workers():
    assert [features._fair_batch_size(Engine(), count) for count in (1, 6, 9, 17, 1000)] == [4, 4, 8, 8, 8]


def test_images_are_read_beside_one_another(reader, monkeypatch):
    monkeypatch.setattr("kubegraft.training.sources.usable_processors", lambda: 2)
    meeting, read = threading.Barrier(2), reader.read

    def meets(index):
        meeting.wait(timeout=30)
        return read(index)

    monkeypatch.setattr(reader, "read", meets)
    source = ImageSource(reader, SIZE)
    count = len(source.labels) // 2 * 2
    batches = epoch_batches(source.labels[:count], batch_size=count, seed=0, epoch=0, shuffle=False)
    images = next(iter(source.inputs(batches, slice(None), slice(None), count)))
    assert len(images) == count
