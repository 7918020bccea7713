"""Weights: from the package, from Keras's cache, from files; none of which is trusted."""

import hashlib
import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from kubegraft.config import HeadConfig
from kubegraft.errors import WeightsError
from kubegraft.modeling.backbones import get_backbone
from kubegraft.modeling.classifier import build_classifier, model_digest, parts, save_classifier
from kubegraft.modeling.efficientnet_lite0 import require_packaged
from kubegraft.modeling.torch_pickle import read_tensors
from kubegraft.modeling.weights import check_weights

SIZE = 32
SMALL = get_backbone("mobilenet_v3_small")


@pytest.fixture(scope="module")
def trained() -> Any:
    return SMALL.build(SIZE, "none", seed=11)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_seed_gives_the_same_random_weights(trained: Any) -> None:
    assert model_digest(SMALL.build(SIZE, "none", seed=11)) == model_digest(trained)
    assert model_digest(SMALL.build(SIZE, "none", seed=12)) != model_digest(trained)


def test_a_weights_file_is_loaded_and_its_digest_checked(trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.weights.h5"
    trained.save_weights(path)
    assert check_weights(SMALL, str(path), _sha256(path).upper()) == _sha256(path)
    loaded = SMALL.build(SIZE, str(path), weights_sha256=_sha256(path))
    assert model_digest(loaded) == model_digest(trained)
    assert model_digest(SMALL.build(SIZE, path.as_uri())) == model_digest(trained)
    for use in (
        check_weights,
        lambda backbone, weights, sha: backbone.build(SIZE, weights, weights_sha256=sha),
    ):
        with pytest.raises(WeightsError, match=r"`weights_sha256` must be.*Received: 0000"):
            use(SMALL, str(path), "0" * 64)


def test_weights_of_a_plain_keras_application_are_loaded(tmp_path: Path) -> None:
    theirs = keras.applications.MobileNetV3Small(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    pixels = np.random.default_rng(0).uniform(0, 255, (1, SIZE, SIZE, 3)).astype(np.float32)
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    theirs.save(tmp_path / "theirs.keras")
    for name in ("theirs.weights.h5", "theirs.keras"):
        ours = SMALL.build(SIZE, str(tmp_path / name))
        np.testing.assert_array_equal(ours(pixels), theirs(pixels))


def test_the_scaling_of_efficientnet_follows_the_file(tmp_path: Path) -> None:
    """Keras scales once more with its own ImageNet weights, by a layer that the file does not hold."""
    backbone = get_backbone("efficientnet_b0")
    theirs = keras.applications.EfficientNetB0(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    theirs.save_weights(tmp_path / "scratch.weights.h5")
    mean, deviation = np.array([0.485, 0.456, 0.406], "float32"), np.array([0.229, 0.224, 0.225], "float32")
    theirs.get_layer("normalization").set_weights([mean, deviation**2, np.int64(0)])
    theirs.save_weights(tmp_path / "imagenet.weights.h5")
    pixels = np.full((1, SIZE, SIZE, 3), 51, np.float32)
    for name, expected in (("scratch", 0.2), ("imagenet", (0.2 - mean) / deviation / np.sqrt(deviation))):
        core = backbone.build(SIZE, str(tmp_path / f"{name}.weights.h5"))
        seen = keras.Model(core.input, core.get_layer("stem_conv").input)(pixels)
        np.testing.assert_allclose(np.asarray(seen)[0, 9, 9], np.broadcast_to(expected, 3), atol=1e-5)


def test_a_classifier_gives_its_backbone_to_another(tmp_path: Path) -> None:
    config = HeadConfig(weights="none", dropout=0, seed=4, features="levels")
    model = build_classifier(SMALL, SIZE, ("a", "b"), config)
    path = save_classifier(model, tmp_path, {"classes": ["a", "b"]})
    given = parts(build_classifier(SMALL, 48, ("a", "b", "c"), replace(config, weights=str(path)))).backbone
    for one, other in zip(given.get_weights(), parts(model).backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_of_another_backbone_show_how_the_layers_differ(trained: Any, tmp_path: Path) -> None:
    path = tmp_path / "small.weights.h5"
    trained.save_weights(path)
    large = get_backbone("mobilenet_v3_large")
    with pytest.raises(WeightsError) as caught:
        large.build(SIZE, str(path))
    message = str(caught.value)
    assert "must hold the layers of mobilenet_v3_large" in message
    assert "- layers/batch_normalization" in message
    assert "+ layers/" in message
    assert "more\n" in message


def test_one_other_shape_is_the_only_difference_shown(tmp_path: Path) -> None:
    vgg16, path = get_backbone("vgg16"), tmp_path / "changed.weights.h5"
    vgg16.build(SIZE, "none").save_weights(path)
    with h5py.File(path, "r+") as file:
        del file["layers/conv2d_1/vars/1"]
        file["layers/conv2d_1/vars/1"] = np.zeros(63, np.float32)
    with pytest.raises(WeightsError) as caught:
        vgg16.build(SIZE, str(path))
    lines = [line for line in str(caught.value).splitlines() if line.startswith(("- ", "+ "))]
    assert lines == [
        "- layers/conv2d_1 [(3, 3, 64, 64), (64,)] (block1_conv2)",
        "+ layers/conv2d_1 [(3, 3, 64, 64), (63,)] (block1_conv2)",
    ]


def test_a_keras_file_with_a_lambda_is_refused(tmp_path: Path) -> None:
    inputs = keras.Input((SIZE, SIZE, 3))
    keras.Model(inputs, keras.layers.Lambda(lambda x: x * 2)(inputs)).save(tmp_path / "evil.keras")
    with pytest.raises(WeightsError, match="Lambda, which may run any code"):
        SMALL.build(SIZE, str(tmp_path / "evil.keras"))


def test_a_keras_file_that_names_foreign_code_is_refused(trained: Any, tmp_path: Path) -> None:
    trained.save(tmp_path / "good.keras")
    with (
        zipfile.ZipFile(tmp_path / "good.keras") as good,
        zipfile.ZipFile(tmp_path / "evil.keras", "w") as evil,
    ):
        for name in good.namelist():
            content = good.read(name)
            if name == "config.json":
                content = content.replace(
                    b'"module": "keras.layers", "class_name": "Conv2D"', b'"module": "os"', 1
                )
                content = content.replace(b'"module": "os"', b'"module": "os", "class_name": "system"', 1)
            evil.writestr(name, content)
    with pytest.raises(WeightsError, match=r"os\.system, which may run any code"):
        SMALL.build(SIZE, str(tmp_path / "evil.keras"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("imagenet21k", r"must be 'imagenet', 'none', or end with.*Did you mean 'imagenet'"),
        ("missing.weights.h5", "must be an existing file"),
        ("resnet50_notop.h5", r"belongs into .*models"),
    ],
)
def test_weights_that_do_not_exist_are_refused_before_any_work(weights: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        check_weights(SMALL, weights)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    for name in ("damaged.weights.h5", "damaged.keras"):
        (tmp_path / name).write_bytes(b"not what it says")
        with pytest.raises(WeightsError, match="must be a Keras weights file"):
            SMALL.build(SIZE, str(tmp_path / name))


def test_without_network_imagenet_weights_say_which_file_to_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(WeightsError) as caught:
        check_weights(get_backbone("vgg16"), "imagenet")
    expected = tmp_path / "models" / "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
    assert f"Put that file at {expected}" in str(caught.value)
    assert "weights='none'" in str(caught.value)


def test_imagenet_weights_in_the_cache_of_keras_need_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    theirs = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(96, 96, 3))
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_96_no_top.h5"
    with h5py.File(path, "w") as file:
        save_weights_to_hdf5_group(file, theirs)
    ours = get_backbone("mobilenet_v2").build(96, "imagenet")
    pixels = np.random.default_rng(0).uniform(0, 255, (1, 96, 96, 3)).astype(np.float32)
    scaled = keras.applications.mobilenet_v2.preprocess_input(pixels.copy())
    np.testing.assert_allclose(ours(pixels), theirs(scaled), atol=1e-5)
    elsewhere = tmp_path / "carried" / path.name
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    carried = get_backbone("mobilenet_v2").build(96, str(elsewhere))
    assert model_digest(carried) == model_digest(ours)


def test_a_file_that_is_not_the_published_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5").write_bytes(b"other")
    with pytest.raises(WeightsError, match="md5 d3e8ec802a04aa4fc771ee12a9a9b836"):
        SMALL.build(SIZE, "imagenet")
    with pytest.raises(WeightsError, match="md5 d3e8ec802a04aa4fc771ee12a9a9b836"):
        check_weights(SMALL, str(next((tmp_path / "models").iterdir())))


def test_the_packaged_weights_give_the_features_that_numpy_computes() -> None:
    """The stem and the first block, computed from the file's tensors without Keras."""
    tensors = read_tensors(require_packaged())
    core = get_backbone("efficientnet_lite0").build(32, "imagenet")
    pixels = np.random.default_rng(0).uniform(0, 255, (32, 32, 3)).astype(np.float32)

    def norm(values: np.ndarray, name: str) -> np.ndarray:
        scale, offset, mean, variance = (
            tensors[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (values - mean) / np.sqrt(variance + 1e-3) * scale + offset

    # TensorFlow's "same": at stride 2 an even size is padded at its end only.
    padded = np.pad((pixels - 127) / 128, ((0, 1), (0, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))[::2, ::2]
    stem = np.clip(norm(np.einsum("yxcij,ocij->yxo", windows, tensors["_conv_stem.weight"]), "_bn0"), 0, 6)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(stem, ((1, 1), (1, 1), (0, 0))), (3, 3), (0, 1))
    depthwise = np.einsum("yxcij,cij->yxc", windows, tensors["_blocks.0._depthwise_conv.weight"][:, 0])
    depthwise = np.clip(norm(depthwise, "_blocks.0._bn1"), 0, 6)
    expected = norm(depthwise @ tensors["_blocks.0._project_conv.weight"][:, :, 0, 0].T, "_blocks.0._bn2")

    first_block = keras.Model(core.input, core.get_layer("block0_project_norm").output)
    np.testing.assert_allclose(np.asarray(first_block(pixels[None]))[0], expected, atol=1e-3)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def _legacy_file(path: Path, content: Any) -> Path:
    with path.open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, {}, content, []):
            pickle.dump(part, file, protocol=2)
    return path


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    file = _legacy_file(tmp_path / "evil.pth", OrderedDict(weight=_Evil(tmp_path / "made")))
    with pytest.raises(WeightsError, match="mkdir is not allowed"):
        read_tensors(file)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "allowed", [eval, getattr, np.frombuffer, pickle.loads, Path], ids=lambda f: f.__name__
)
def test_the_unpickler_knows_no_other_names(allowed: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not allowed"):
        read_tensors(_legacy_file(tmp_path / "names.pth", {"weight": allowed}))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = require_packaged().read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="must be a PyTorch file of tensors only"):
        read_tensors(tmp_path / "short.pth")


@pytest.mark.parametrize("config", ["{not json", "[" * 100_000], ids=["damaged", "deep"])
def test_a_keras_file_with_a_damaged_description_is_a_clear_error(tmp_path: Path, config: str) -> None:
    path = tmp_path / "damaged.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config)
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(WeightsError, match="must be a Keras weights file"):
        SMALL.build(SIZE, str(path))


def test_a_weights_file_with_odd_names_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "odd.weights.h5"
    with h5py.File(path, "w") as file:
        file["layers/x/vars/abc"] = 1
    with pytest.raises(WeightsError, match="must be a Keras weights file"):
        SMALL.build(SIZE, str(path))
