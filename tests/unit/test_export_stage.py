from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from kubegraft.config import EvaluateConfig, ExportConfig
from kubegraft.data.manifest import load_manifest
from kubegraft.errors import DataError, ExportError, ModelError
from kubegraft.evaluation.evaluate import evaluate
from kubegraft.export import verification
from kubegraft.export.export import export
from kubegraft.export.predict import Prediction, predict
from kubegraft.modeling.classifier import load_classifier
from tests.classifier_stages import NAMES, write_dataset, write_model


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    dataset = write_dataset(root)
    model = write_model(root / "model", dataset, skill=8, features="levels")
    evaluation = root / "evaluation"
    evaluate(dataset, model, evaluation, EvaluateConfig(num_bootstrap_samples=10, num_worst_images=1))
    result = export(dataset, model, evaluation, root / "export", ExportConfig(num_verification_images=6))
    paths = {"root": root, "dataset": dataset, "model": model, "evaluation": evaluation}
    return paths | {"export": root / "export", "result": result}


@pytest.fixture(scope="module")
def photographs():
    """Encoded images, name -> (bytes, pixels that they must be seen as)."""
    random = np.random.default_rng(5)
    pixels = random.integers(0, 256, (47, 31, 3), dtype=np.uint8)
    stored = {}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
        file = io.BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {}
        Image.fromarray(pixels).save(file, kind, **options)
        seen = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
        stored[kind.lower()] = (file.getvalue(), np.asarray(seen))
    turned = Image.Exif()
    turned[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=turned)
    upright = np.rot90(np.asarray(Image.open(io.BytesIO(file.getvalue()))), k=-1)
    stored["turned jpeg"] = (file.getvalue(), upright)
    return stored


@pytest.fixture(scope="module")
def own_answer(paths):
    """What the trained model itself says about one image."""
    model = load_classifier(paths["model"]).model
    return lambda pixels: np.asarray(model(pixels[np.newaxis], training=False))[0]


def test_both_formats_are_proved_in_a_fresh_process(paths):
    proof = json.loads((paths["export"] / "verification.json").read_text())
    assert set(proof["formats"]) == {"keras", "saved_model"}
    assert all(each["max_difference"] <= 1e-5 for each in proof["formats"].values())
    assert set(proof["formats"]["saved_model"]) >= {"batch", "single", "default"}
    assert set(proof["formats"]["keras"]) >= {"batch", "single"}
    assert proof["num_images"] == len({image["sha256"] for image in proof["images"]}) == 6
    assert {image["split"] for image in proof["images"]} == {"test"}
    assert paths["result"].metrics["saved_model_max_difference"] <= 1e-5
    assert paths["result"].provenance["evaluation_digest"]


def test_the_evaluation_travels_with_the_export(paths):
    metadata = json.loads((paths["export"] / "model.json").read_text())
    assert metadata["classes"] == list(NAMES)
    assert metadata["evaluation"]["test_accuracy"] > 0.7
    assert load_classifier(paths["export"]).metadata["classes"] == list(NAMES)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "turned jpeg"])
def test_the_saved_model_answers_raw_bytes_as_the_model_answers_pixels(paths, own_answer, photographs, kind):
    encoded, pixels = photographs[kind]
    serve = tf.saved_model.load(str(paths["export"] / "saved_model")).signatures["serve"]
    answer = serve(image_bytes=tf.constant([encoded]))
    np.testing.assert_allclose(answer["probabilities"][0], own_answer(pixels), atol=1e-5)
    assert [name.decode() for name in answer["class_names"].numpy()[0]] == list(NAMES)


def test_a_served_batch_mixes_formats_and_sizes(paths, photographs):
    saved_model = tf.saved_model.load(str(paths["export"] / "saved_model"))
    encoded = [photographs["png"][0], photographs["turned jpeg"][0], photographs["gif"][0]]
    together = saved_model.signatures["serving_default"](image_bytes=tf.constant(encoded))
    alone = [saved_model.serve(tf.constant([each]))["probabilities"][0] for each in encoded]
    np.testing.assert_allclose(together["probabilities"], np.stack(alone), atol=1e-5)
    best = together["probabilities"].numpy().argmax(axis=1)
    assert [name.decode() for name in together["predicted_class"].numpy()] == [NAMES[index] for index in best]


def test_bytes_that_are_no_image_are_an_invalid_argument(paths):
    serve = tf.saved_model.load(str(paths["export"] / "saved_model")).signatures["serve"]
    with pytest.raises(tf.errors.InvalidArgumentError):
        serve(image_bytes=tf.constant([b"no image"]))


@pytest.mark.parametrize("size", [(32, 32), (47, 31), (5, 200)], ids=str)
def test_the_keras_file_takes_pixels_of_any_size_without_kubegraft(paths, own_answer, size):
    pixels = np.random.default_rng(1).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    model = keras.saving.load_model(paths["export"] / "model.keras", compile=False, safe_mode=True)
    answers = model.predict(pixels, verbose=0)
    for row, each in zip(answers, pixels, strict=True):
        np.testing.assert_allclose(row, own_answer(each), atol=1e-5)


def test_an_export_that_answers_otherwise_is_not_published(paths, tmp_path, monkeypatch):
    original = verification.expected_answers
    monkeypatch.setattr(
        verification, "expected_answers", lambda model, images: original(model, images) + np.float32(1e-3)
    )
    config = ExportConfig(num_verification_images=1)
    with pytest.raises(ExportError, match="within `tolerance`"):
        export(paths["dataset"], paths["model"], None, tmp_path / "export", config)
    assert not (tmp_path / "export").exists()


def test_an_evaluation_of_another_model_is_refused(paths, tmp_path):
    model = write_model(tmp_path / "model", paths["dataset"], skill=1)
    with pytest.raises(ExportError, match="this very model"):
        export(paths["dataset"], model, paths["evaluation"], tmp_path / "export", ExportConfig())


def test_other_splits_help_out_when_the_test_split_is_small(paths):
    manifest = load_manifest(paths["dataset"])
    images = verification.choose_images(paths["dataset"], manifest, 10_000)
    assert len(images) == manifest.num_accepted
    assert images[0].split == "test"
    assert images[-1].split == "train"


@pytest.fixture(scope="module")
def image_files(tmp_path_factory, photographs):
    folder = tmp_path_factory.mktemp("photographs")
    files = {kind: folder / f"{kind} ü" for kind in photographs}  # the name's ending says nothing
    for kind, file in files.items():
        file.write_bytes(photographs[kind][0])
    return files


@pytest.mark.parametrize("place", ["export", "export/saved_model", "export/model.keras", "model"])
def test_predictions_are_the_models_own_for_every_format(paths, own_answer, photographs, image_files, place):
    answers = predict(paths["root"] / place, list(image_files.values()))
    for kind, answer in zip(image_files, answers, strict=True):
        assert isinstance(answer, Prediction), answer
        expected = own_answer(photographs[kind][1])
        assert answer.path == str(image_files[kind])
        assert answer.class_name == NAMES[expected.argmax()]
        assert dict(answer.top) == pytest.approx(dict(zip(NAMES, expected, strict=True)), abs=1e-5)
        assert answer.top[0] == (answer.class_name, answer.probability)


@pytest.mark.parametrize("place", ["export", "model"])
def test_a_bad_image_is_named_and_the_others_are_answered(paths, image_files, tmp_path, place):
    jpeg = image_files["jpeg"].read_bytes()
    bad = {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "text.png": b"a text",
        "empty.gif": b"",
        "cut.webp": image_files["webp"].read_bytes()[:40],
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    others = [tmp_path / name for name in ("missing.jpg", "folder.jpg", "pipe.jpg")]
    questions = [*(tmp_path / name for name in bad), *others, image_files["png"]]
    *refused, answered = predict(paths["root"] / place, questions)
    assert isinstance(answered, Prediction)
    for question, error in zip(questions, refused, strict=False):
        assert isinstance(error, DataError)
        assert str(question) in str(error)
        assert "Graph execution error" not in str(error)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="which has none"):
        predict(tmp_path, [])
    with pytest.raises(ModelError, match="does not exist"):
        predict(tmp_path / "nothing", [])
    (tmp_path / "saved_model.pb").write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="SavedModel"):
        predict(tmp_path, [])


def test_a_new_process_answers_within_ten_seconds(paths, image_files):
    code = "import sys; from kubegraft.export.predict import predict; print(predict(*sys.argv[1:2], sys.argv[2:]))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code, str(paths["export"]), str(image_files["jpeg"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: what else this machine does must not fail the test.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert "Prediction(path=" in done.stdout
