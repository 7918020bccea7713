"""The registry of backbones, as names and as a table."""

import subprocess
import sys

import pytest

from kubegraft.errors import ConfigError
from kubegraft.modeling.backbones import BACKBONES, backbone_table, get_backbone

REQUIRED = [
    "VGG16",
    "VGG19",
    "ResNet50",
    "ResNet101",
    "ResNet50V2",
    "InceptionV3",
    "InceptionResNetV2",
    "Xception",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "MobileNetV3Large",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetB1",
    "EfficientNetB2",
    "EfficientNetB3",
    "EfficientNetB4",
    "EfficientNetV2B0",
    "EfficientNetV2B1",
    "EfficientNetV2B2",
    "EfficientNetV2B3",
    "EfficientNetV2S",
    "ConvNeXtTiny",
    "ConvNeXtSmall",
    "NASNetMobile",
    "EfficientNetLite0",
]


def test_the_registry_has_every_backbone_under_its_keras_name() -> None:
    assert {get_backbone(name).display_name for name in REQUIRED} == set(REQUIRED)
    assert len(BACKBONES) == len(REQUIRED)


@pytest.mark.parametrize("name", ["ResNet50", "resnet_50", "RESNET-50", " resnet50 "])
def test_case_and_separators_do_not_count(name: str) -> None:
    assert get_backbone(name) is BACKBONES["resnet50"]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("resnet5", "resnet50"), ("effcientnet_lite0", "efficientnet_lite0"), ("MobilNetV2", "mobilenet_v2")],
)
def test_a_typo_gets_the_nearest_name(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean '{meant}'"):
        get_backbone(typo)


def test_an_accepted_input_size_is_the_next_one_not_smaller() -> None:
    assert get_backbone("inception_v3").accepted_input_size(32) == 75
    assert get_backbone("inception_v3").accepted_input_size(101) == 101


def test_the_table_is_made_without_tensorflow() -> None:
    script = (
        "import sys; from kubegraft.modeling.backbones import backbone_table; print(len(backbone_table())); "
        "sys.exit(bool({'tensorflow', 'keras', 'h5py'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == str(len(REQUIRED))


def test_the_table_says_where_weights_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mobilenet_1_0_160_tf_no_top.h5").touch()
    weights = {row["name"]: row["weights"] for row in backbone_table()}
    assert weights["efficientnet_lite0"] == "packaged"
    assert weights["mobilenet"] == "cached"
    assert weights["vgg16"] == "download"
