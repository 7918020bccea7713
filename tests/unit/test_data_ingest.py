import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kubegraft import tensorflow_setup  # noqa: F401 - before tensorflow
from kubegraft.config import IngestConfig
from kubegraft.data import inspection
from kubegraft.data.folders import FoundFile
from kubegraft.data.ingest import check_images, ingest
from kubegraft.data.inspection import REASONS, Inspection, InspectionLog, inspect_file
from kubegraft.data.manifest import load_manifest, read_images, read_quarantine
from kubegraft.errors import ConfigError, DataError


def picture(number, size=(12, 10)):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image, format_="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def draw(root, classes=("cat", "dog"), per_class=6, first=0):
    for label, name in enumerate(classes):
        for number in range(per_class):
            write(root / name / f"{number}.png", encoded(picture(first + 1000 * label + number)))
    return root


def run(output, source, **options):
    result = ingest(output, IngestConfig(source=str(source), **options))
    manifest = load_manifest(output)
    assert manifest.num_accepted + manifest.num_quarantined == manifest.num_found
    assert manifest.num_accepted == sum(split.num_images for split in manifest.splits.values())
    assert len(list(read_images(output))) == manifest.num_accepted
    assert len(read_quarantine(output)) == manifest.num_quarantined
    assert result.digest == manifest.digest
    return manifest


@pytest.fixture
def messy(tmp_path):
    """Every kind of file that a user's folder has held, good ones first."""
    root = draw(tmp_path / "messy", ("cat", "dog"), per_class=8)
    good = {
        "cat/cmyk.jpg": encoded(picture(1).convert("CMYK"), "JPEG"),
        "cat/sixteen bits.png": encoded(
            Image.fromarray(np.arange(120, dtype=np.uint16).reshape(10, 12) * 500)
        ),
        "cat/animated.gif": encoded(picture(2), "GIF", save_all=True, append_images=[picture(3), picture(4)]),
        "dog/Gr\u00fc\u00dfe aus K\u00f6ln.jpg": encoded(picture(5), "JPEG"),
        "dog/wrong name.txt": encoded(picture(6), "BMP"),
        "dog/modern.webp": encoded(picture(7), "WEBP"),
        "dog/scan.tif": encoded(picture(8).convert("L"), "TIFF"),
        "dog/sub/sub/deep.png": encoded(picture(9).convert("RGBA")),
        "single/only.png": encoded(picture(10)),
    }
    big_jpeg = encoded(picture(11, (200, 200)), "JPEG")
    bad = {
        "cat/truncated.jpg": (big_jpeg[: len(big_jpeg) // 2], "truncated"),
        "cat/almost whole.jpg": (big_jpeg[:-2], "truncated"),
        "cat/truncated.png": (encoded(picture(12, (90, 90)))[:9000], "truncated"),
        "cat/text.jpg": (b"This is not an image.\n", "not_an_image"),
        "cat/page.jpg": (b"<html>404</html>", "not_an_image"),
        "dog/empty.png": (b"", "empty_file"),
        "dog/damaged.png": (encoded(picture(13)).replace(b"IDAT", b"IDAX"), "undecodable"),
        "dog/bomb.png": (encoded(Image.new("1", (20000, 20000))), "too_large"),
        "dog/phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported_format"),
        "dog/.DS_Store": (b"\0\0\0\x01Bud1", "system_file"),
        "Thumbs.db": (b"x", "system_file"),
        "README.txt": (b"hello", "outside_classes"),
    }
    for path, data in {**good, **{path: data for path, (data, _) in bad.items()}}.items():
        write(root / path, data)
    write(root / "cat" / os.fsdecode(b"caf\xe9.jpg"), encoded(picture(14), "JPEG"))
    (root / "cat" / "loop.jpg").symlink_to("loop.jpg")
    (root / "dog" / "up").symlink_to("..")
    reasons = {path: reason for path, (_, reason) in bad.items()}
    return root, set(good), reasons | {"cat/loop.jpg": "symlink_loop", "dog/up": "symlink_loop"}


def test_every_file_of_a_messy_folder_is_accounted_for(messy, tmp_path):
    root, good, bad = messy
    manifest = run(tmp_path / "dataset", root)
    quarantined = {file.path: file for file in read_quarantine(tmp_path / "dataset")}
    assert {path: file.reason for path, file in quarantined.items()} == bad
    assert "Invalid JPEG data" in quarantined["cat/truncated.jpg"].detail
    assert "Invalid PNG" in quarantined["cat/truncated.png"].detail
    accepted = {image.path: image for image in read_images(tmp_path / "dataset")}
    assert good <= set(accepted)
    assert "cat/caf\\xe9.jpg" in accepted
    assert manifest.num_found == 16 + len(good) + 1 + len(bad)
    assert accepted["cat/cmyk.jpg"].mode == "CMYK"
    assert accepted["dog/wrong name.txt"].format == "bmp"
    assert accepted["single/only.png"].split == "train"
    assert any("'single' has a single training image" in warning for warning in manifest.warnings)
    report = (tmp_path / "dataset" / "report.html").read_text(encoding="utf-8")
    assert all(path in report and reason in report for path, reason in bad.items())
    for name in ("images.jsonl", "quarantine.jsonl", "manifest.json"):
        (tmp_path / "dataset" / name).read_bytes().decode("utf-8")
    lines = (tmp_path / "dataset" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(json.loads(lines[0])) == {"path", "class", "split", "reason", "detail"}


def test_file_names_can_not_inject_into_the_report(tmp_path):
    root = draw(tmp_path / "images")
    write(root / "cat" / "<script>alert(1)<", b"text")
    run(tmp_path / "dataset", root)
    report = (tmp_path / "dataset" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in report
    assert "&lt;script&gt;alert(1)&lt;" in report


def test_the_digest_depends_on_bytes_alone(tmp_path):
    first = run(tmp_path / "first", draw(tmp_path / "images"))
    for number, path in enumerate(sorted((tmp_path / "images").rglob("*.png"), reverse=True)):
        write(tmp_path / "renamed" / path.parent.name / "sub" / f"x{number}.jpg", path.read_bytes())
        os.utime(tmp_path / "renamed" / path.parent.name / "sub" / f"x{number}.jpg", (number, number))
    second = run(tmp_path / "second", tmp_path / "renamed")
    assert second.digest == first.digest
    hashes = [
        [(image.split, image.sha256, image.index) for image in read_images(tmp_path / name)]
        for name in ("first", "second")
    ]
    assert hashes[0] == hashes[1]
    assert run(tmp_path / "other seed", tmp_path / "images", seed=1).digest != first.digest
    write(tmp_path / "images" / "cat" / "more.png", encoded(picture(999)))
    assert run(tmp_path / "more", tmp_path / "images").digest != first.digest


def test_the_digest_is_the_same_on_every_machine(tmp_path):
    # Pixels come from fixed bytes, so that no encoder's version matters.
    for number in range(6):
        gif = b"GIF87a\x01\x00\x01\x00\x80\x00\x00" + bytes([number, 0, 0, 255, 255, 255])
        gif += b",\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
        write(tmp_path / "images" / ("a" if number % 2 else "b") / f"{number}.gif", gif)
    manifest = run(tmp_path / "dataset", tmp_path / "images")
    assert manifest.digest == "c1cbfdffccefeb50ae5fe7648a655e27c2d81db07f38df9ea1922e1c50242a62"


def test_given_splits_are_kept_and_test_is_carved_from_train(tmp_path):
    root = tmp_path / "images"
    draw(root / "train", per_class=20)
    draw(root / "val", per_class=5, first=500)
    manifest = run(tmp_path / "dataset", root)
    assert {name: split.class_counts for name, split in manifest.splits.items()} == {
        "train": (18, 18),
        "validation": (5, 5),
        "test": (2, 2),
    }
    assert all(
        (image.split == "validation") == image.path.startswith("val/")
        for image in read_images(tmp_path / "dataset")
    )
    assert manifest.facts.num_train == 36
    assert (manifest.facts.median_width, manifest.facts.median_height) == (12, 10)


def test_the_same_image_in_two_splits_or_classes_is_warned_of(tmp_path):
    root = draw(tmp_path / "images" / "train").parent
    draw(root / "validation", first=500)
    shutil.copy(root / "train/cat/0.png", root / "validation/cat/copy.png")
    shutil.copy(root / "train/cat/1.png", root / "train/dog/copy.png")
    warnings = run(tmp_path / "dataset", root).warnings
    assert any(
        "1 image is in more than one split" in warning and "copy.png" in warning for warning in warnings
    )
    assert any("1 image is in more than one class" in warning for warning in warnings)


def test_copies_in_a_class_stay_in_one_split(tmp_path):
    root = draw(tmp_path / "images", per_class=10)
    for path in list(root.rglob("*.png")):
        shutil.copy(path, path.with_suffix(".copy.png"))
    splits = {}
    manifest = run(tmp_path / "dataset", root)
    for image in read_images(tmp_path / "dataset"):
        assert splits.setdefault(image.sha256, image.split) == image.split
    assert any("20 files are copies" in warning for warning in manifest.warnings)


def test_too_many_bad_files_stop_the_run(tmp_path):
    root = draw(tmp_path / "images")
    for number in range(4):
        write(root / "cat" / f"{number}.txt", b"text")
    write(root / "dog" / "empty.jpg", b"")
    write(root / "notes.txt", b"not in a class, so not bad")
    with pytest.raises(DataError, match=r"5 of 17 \(29\.4%\).*4 not_an_image.*1 empty_file"):
        run(tmp_path / "dataset", root, max_bad_fraction=0.2)
    assert not (tmp_path / "dataset").exists()
    run(tmp_path / "dataset", root, max_bad_fraction=0.3)


def test_a_class_without_a_usable_image_stops_the_run(tmp_path):
    root = draw(tmp_path / "images", ("cat", "dog", "eel"))
    for path in (root / "eel").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="none that can be used for 'eel'"):
        run(tmp_path / "dataset", root)


def test_a_split_that_would_be_empty_stops_the_run(tmp_path):
    with pytest.raises(DataError, match="`validation` split must have an image"):
        run(tmp_path / "dataset", draw(tmp_path / "images", per_class=2))


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_is_read_like_the_folder_in_it(tmp_path, kind):
    root = draw(tmp_path / "flowers")
    archive = shutil.make_archive(
        str(tmp_path / "archive"), {"zip": "zip", "tar.gz": "gztar"}[kind], tmp_path, "flowers"
    )
    direct = run(tmp_path / "direct", root)
    packed = run(tmp_path / "packed", archive)
    assert packed.digest == direct.digest
    assert next(read_images(tmp_path / "packed")).path.startswith("flowers/cat/")


def test_an_archive_member_can_not_leave_the_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.writestr("../escaped.txt", "x")
    with tarfile.open(tmp_path / "evil.tar", "w") as file:
        file.addfile(tarfile.TarInfo("../escaped.txt"))
    for name in ("evil.zip", "evil.tar"):
        with pytest.raises(DataError, match="stay inside it"):
            run(tmp_path / "dataset", tmp_path / name)
    assert not list(tmp_path.rglob("escaped.txt"))


def test_a_damaged_archive_is_a_clear_error(tmp_path):
    archive = Path(shutil.make_archive(str(tmp_path / "archive"), "gztar", draw(tmp_path / "images")))
    archive.write_bytes(archive.read_bytes()[:-500])
    with pytest.raises(DataError, match="must be a whole archive"):
        run(tmp_path / "dataset", archive)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "must exist"),
        ("sample://digit", "Did you mean 'digits'"),
        ("https2://host/a.zip", "Did you mean 'https'"),
        (__file__, "neither"),
    ],
)
def test_a_source_that_is_none_is_a_clear_error(tmp_path, source, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "dataset", source)


def test_the_digits_sample(tmp_path):
    manifest = run(tmp_path / "dataset", "sample://digits")
    assert manifest.classes == tuple("0123456789")
    assert manifest.num_found == manifest.num_accepted == 1797


def test_a_killed_ingest_continues_to_the_same_result(tmp_path):
    root = draw(tmp_path / "images", per_class=250)
    output = tmp_path / "dataset"
    code = (
        "import sys, time; from kubegraft.data import inspection; from kubegraft.data.ingest import ingest;"
        "from kubegraft.config import IngestConfig; inspect = inspection.inspect_file;"
        "inspection.inspect_file = lambda location: (time.sleep(0.005), inspect(location))[1];"
        "ingest(sys.argv[1], IngestConfig(source=sys.argv[2]))"
    )
    log = tmp_path / ".dataset.kubegraft-work" / "scratch" / "inspected.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code, output, root], stderr=subprocess.DEVNULL)
    while not (log.exists() and log.stat().st_size > 10_000):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = log.read_bytes().count(b"\n")
    log.write_bytes(log.read_bytes() + b'{"path": "torn')
    inspected = []
    original = inspection.inspect_file
    inspection.inspect_file = lambda location: (inspected.append(location), original(location))[1]
    try:
        manifest = run(output, root)
    finally:
        inspection.inspect_file = original
    assert len(inspected) == 500 - kept
    assert manifest.digest == run(tmp_path / "uninterrupted", root).digest
    assert not (tmp_path / ".dataset.kubegraft-work").exists()


def test_a_changed_file_is_inspected_again(tmp_path):
    file = FoundFile("x", "x", "a", None, size=3, modified=5)
    with InspectionLog(tmp_path / "log") as log:
        log.add(file, Inspection(sha256="1"))
    with InspectionLog(tmp_path / "log") as log:
        assert log.get(file) == Inspection(sha256="1")
        assert log.get(FoundFile("x", "x", "a", None, size=3, modified=6)) is None


@pytest.mark.parametrize("torn", [b"\0" * 50 + b"\n", b'{"path": "y"', b'{"path": "y"}\n', b"1\n"])
def test_a_torn_log_of_inspections_is_kept_up_to_the_tear(tmp_path, torn):
    files = [FoundFile(name, name, "a", None) for name in ("x", "y", "z")]
    with InspectionLog(tmp_path / "log") as log:
        log.add(files[0], Inspection(sha256="1"))
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole + torn)
    with InspectionLog(tmp_path / "log") as log:
        assert [log.get(file) for file in files] == [Inspection(sha256="1"), None, None]
        log.add(files[1], Inspection(sha256="2"))
    with InspectionLog(tmp_path / "log") as log:
        assert log.get(files[1]) == Inspection(sha256="2")


def test_a_truncated_file_of_any_format_is_no_image(tmp_path):
    for format_ in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"):
        data = encoded(picture(1, (60, 60)), format_)
        for end in (20, len(data) // 2, len(data) - 20):
            (tmp_path / "file").write_bytes(data[:end])
            verdict = inspect_file(str(tmp_path / "file"))
            assert verdict.reason in ("truncated", "undecodable"), (format_, end, verdict)
            assert verdict.reason in REASONS


def test_an_output_inside_of_the_images_is_refused_and_leaves_nothing(tmp_path):
    source = draw(tmp_path / "photos")
    with pytest.raises(ConfigError, match="outside of the images"):
        run(source / "dataset", source)
    assert sorted(path.name for path in source.iterdir()) == ["cat", "dog"]


def test_a_look_tells_the_digest_that_ingest_will_have_and_leaves_nothing(tmp_path, monkeypatch):
    source = tmp_path / "photos"
    draw(source)
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(aside))
    found = check_images(IngestConfig(source=str(source)))
    assert not list(aside.iterdir())
    result = ingest(tmp_path / "out", IngestConfig(source=str(source)), found.digest)
    assert result.digest == found.digest
    assert result.metrics == found.metrics


def test_images_that_change_after_the_look_are_refused(tmp_path):
    source = tmp_path / "photos"
    draw(source)
    config = IngestConfig(source=str(source))
    found = check_images(config)
    write(source / "cat" / "one_more.png", encoded(picture(4711)))
    with pytest.raises(DataError, match="must not change while a run reads it"):
        ingest(tmp_path / "out", config, found.digest)
    assert not (tmp_path / "out").exists()
