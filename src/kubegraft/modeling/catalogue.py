"""The backbones: facts that are true of each, in one place. `kubegraft.modeling.backbones` gives them out."""

from __future__ import annotations

from typing import Final

from kubegraft.modeling import boundaries
from kubegraft.modeling.backbone import Backbone
from kubegraft.modeling.efficientnet_lite0 import BLOCKS
from kubegraft.modeling.imagenet import KERAS_FILES, ImageNetFile

_ORDERING: Final = "_weights_tf_dim_ordering_tf_kernels_notop.h5"
_VGG: Final = "https://arxiv.org/abs/1409.1556"
_RESNET: Final = "https://arxiv.org/abs/1512.03385"
_MOBILENET_V3: Final = "https://arxiv.org/abs/1905.02244"
_CONVNEXT: Final = "https://arxiv.org/abs/2201.03545"


def _file(folder: str, file_hash: str, file_name: str = "") -> ImageNetFile:
    path = f"{folder}/{file_name or folder + _ORDERING}"
    return ImageNetFile(url=KERAS_FILES + path, file_hash=file_hash)


def _efficientnet(
    variant: str, size: int, num_parameters: int, repeats: tuple[int, ...], file_hash: str
) -> Backbone:
    # Keras keeps these in a bucket of their own.
    url = f"https://storage.googleapis.com/keras-applications/efficientnet{variant}_notop.h5"
    return Backbone(
        name=f"efficientnet_{variant}",
        display_name=f"EfficientNet{variant.upper()}",
        native_input_size=size,
        preprocessing="inside",
        blocks=boundaries.efficientnet(repeats),
        num_parameters=num_parameters,
        license="Apache-2.0",
        source="https://arxiv.org/abs/1905.11946",
        imagenet=ImageNetFile(url=url, file_hash=file_hash),
    )


def _efficientnet_v2(
    variant: str, size: int, num_parameters: int, repeats: tuple[int, ...], file_hash: str
) -> Backbone:
    first_stage = "_add" if variant == "s" else "_project_activation"
    return Backbone(
        name=f"efficientnet_v2_{variant}",
        display_name=f"EfficientNetV2{variant.upper()}",
        native_input_size=size,
        preprocessing="inside",
        blocks=boundaries.efficientnet(repeats, first_stage=first_stage),
        num_parameters=num_parameters,
        license="Apache-2.0",
        source="https://arxiv.org/abs/2104.00298",
        imagenet=_file("efficientnet_v2", file_hash, f"efficientnetv2-{variant}_notop.h5"),
    )


def _mobilenet_v3(
    variant: str, num_parameters: int, num_blocks: int, added: set[int], file_hash: str
) -> Backbone:
    prefixes = ["expanded_conv", *(f"expanded_conv_{block}" for block in range(1, num_blocks))]
    return Backbone(
        name=f"mobilenet_v3_{variant}",
        display_name=f"MobileNetV3{variant.capitalize()}",
        native_input_size=224,
        preprocessing="inside",
        blocks=boundaries.inverted_residuals(prefixes, sorted(added), "_project_bn"),
        num_parameters=num_parameters,
        license="Apache-2.0",
        source=_MOBILENET_V3,
        imagenet=_file(
            "mobilenet_v3", file_hash, f"weights_mobilenet_v3_{variant}_224_1.0_float_no_top_v2.h5"
        ),
    )


def _convnext(variant: str, num_parameters: int, repeats: tuple[int, ...], file_hash: str) -> Backbone:
    return Backbone(
        name=f"convnext_{variant}",
        display_name=f"ConvNeXt{variant.capitalize()}",
        native_input_size=224,
        preprocessing="inside",
        blocks=boundaries.convnext(repeats),
        num_parameters=num_parameters,
        license="MIT",
        source=_CONVNEXT,
        imagenet=_file("convnext", file_hash, f"convnext_{variant}_notop.h5"),
    )


CATALOGUE: Final = (
    Backbone(
        name="efficientnet_lite0",
        display_name="EfficientNetLite0",
        native_input_size=224,
        preprocessing="lite",
        blocks=BLOCKS,
        num_parameters=3_413_024,
        license="Apache-2.0",
        source="https://arxiv.org/abs/1905.11946",
    ),
    Backbone(
        name="vgg16",
        display_name="VGG16",
        native_input_size=224,
        preprocessing="caffe",
        blocks=boundaries.VGG,
        num_parameters=14_714_688,
        license="CC-BY-4.0",
        source=_VGG,
        imagenet=_file("vgg16", "6d6bbae143d832006294945121d1f1fc"),
    ),
    Backbone(
        name="vgg19",
        display_name="VGG19",
        native_input_size=224,
        preprocessing="caffe",
        blocks=boundaries.VGG,
        num_parameters=20_024_384,
        license="CC-BY-4.0",
        source=_VGG,
        imagenet=_file("vgg19", "253f8cb515780f3b799900260a226db6"),
    ),
    Backbone(
        name="resnet50",
        display_name="ResNet50",
        native_input_size=224,
        preprocessing="caffe",
        blocks=boundaries.resnet((3, 4, 6, 3)),
        num_parameters=23_587_712,
        license="MIT",
        source=_RESNET,
        imagenet=_file("resnet", "4d473c1dd8becc155b73f8504c6f6626", f"resnet50{_ORDERING}"),
    ),
    Backbone(
        name="resnet101",
        display_name="ResNet101",
        native_input_size=224,
        preprocessing="caffe",
        blocks=boundaries.resnet((3, 4, 23, 3)),
        num_parameters=42_658_176,
        license="MIT",
        source=_RESNET,
        imagenet=_file("resnet", "88cf7a10940856eca736dc7b7e228a21", f"resnet101{_ORDERING}"),
    ),
    Backbone(
        name="resnet50_v2",
        display_name="ResNet50V2",
        native_input_size=224,
        preprocessing="tf",
        blocks=boundaries.resnet((3, 4, 6, 3)),
        num_parameters=23_564_800,
        license="Apache-2.0",
        source="https://arxiv.org/abs/1603.05027",
        imagenet=_file("resnet", "fac2f116257151a9d068a22e544a4917", f"resnet50v2{_ORDERING}"),
    ),
    Backbone(
        name="inception_v3",
        display_name="InceptionV3",
        native_input_size=299,
        min_input_size=75,
        preprocessing="tf",
        blocks=boundaries.INCEPTION_V3,
        num_parameters=21_802_784,
        license="Apache-2.0",
        source="https://arxiv.org/abs/1512.00567",
        imagenet=_file("inception_v3", "bcbd6486424b2319ff4ef7d526e38f63"),
    ),
    Backbone(
        name="inception_resnet_v2",
        display_name="InceptionResNetV2",
        native_input_size=299,
        min_input_size=75,
        preprocessing="tf",
        blocks=boundaries.INCEPTION_RESNET_V2,
        num_parameters=54_336_736,
        license="Apache-2.0",
        source="https://arxiv.org/abs/1602.07261",
        imagenet=_file("inception_resnet_v2", "d19885ff4a710c122648d3b5c3b684e4"),
    ),
    Backbone(
        name="xception",
        display_name="Xception",
        native_input_size=299,
        min_input_size=71,
        preprocessing="tf",
        blocks=boundaries.XCEPTION,
        num_parameters=20_861_480,
        license="MIT",
        source="https://arxiv.org/abs/1610.02357",
        imagenet=_file("xception", "b0042744bf5b25fce3cb969f33bebb97"),
    ),
    Backbone(
        name="mobilenet",
        display_name="MobileNet",
        native_input_size=224,
        preprocessing="tf",
        blocks=boundaries.MOBILENET,
        num_parameters=3_228_864,
        license="Apache-2.0",
        source="https://arxiv.org/abs/1704.04861",
        imagenet=ImageNetFile(
            url=f"{KERAS_FILES}mobilenet/mobilenet_1_0_{{size}}_tf_no_top.h5", sizes=(128, 160, 192, 224)
        ),
    ),
    Backbone(
        name="mobilenet_v2",
        display_name="MobileNetV2",
        native_input_size=224,
        preprocessing="tf",
        blocks=boundaries.inverted_residuals(
            ["expanded_conv", *(f"block_{block}" for block in range(1, 17))],
            (2, 4, 5, 7, 8, 9, 11, 12, 14, 15),
            "_project_BN",
        ),
        num_parameters=2_257_984,
        license="Apache-2.0",
        source="https://arxiv.org/abs/1801.04381",
        imagenet=ImageNetFile(
            url=f"{KERAS_FILES}mobilenet_v2/mobilenet_v2{_ORDERING.replace('_notop', '_1.0_{size}_no_top')}",
            sizes=(96, 128, 160, 192, 224),
        ),
    ),
    _mobilenet_v3("small", 939_120, 11, {2, 4, 5, 7, 9, 10}, "d3e8ec802a04aa4fc771ee12a9a9b836"),
    _mobilenet_v3(
        "large", 2_996_352, 15, {0, 2, 4, 5, 7, 8, 9, 11, 13, 14}, "07fb09a5933dd0c8eaafa16978110389"
    ),
    Backbone(
        name="densenet121",
        display_name="DenseNet121",
        native_input_size=224,
        preprocessing="torch",
        blocks=boundaries.DENSENET,
        num_parameters=7_037_504,
        license="BSD-3-Clause",
        source="https://arxiv.org/abs/1608.06993",
        imagenet=_file("densenet", "30ee3e1110167f948a6b9946edeeb738", f"densenet121{_ORDERING}"),
    ),
    _efficientnet("b0", 224, 4_049_571, (1, 2, 2, 3, 3, 4, 1), "50bc09e76180e00e4465e1a485ddc09d"),
    _efficientnet("b1", 240, 6_575_239, (2, 3, 3, 4, 4, 5, 2), "74c4e6b3e1f6a1eea24c589628592432"),
    _efficientnet("b2", 260, 7_768_569, (2, 3, 3, 4, 4, 5, 2), "111f8e2ac8aa800a7a99e3239f7bfb39"),
    _efficientnet("b3", 300, 10_783_535, (2, 3, 3, 5, 5, 6, 2), "af6d107764bb5b1abb91932881670226"),
    _efficientnet("b4", 380, 17_673_823, (2, 4, 4, 6, 6, 8, 2), "ebc24e6d6c33eaebbd558eafbeedf1ba"),
    _efficientnet_v2("b0", 224, 5_919_312, (1, 2, 2, 3, 5, 8), "893217f2bb855e2983157299931e43ff"),
    _efficientnet_v2("b1", 240, 6_931_124, (2, 3, 3, 4, 6, 9), "0e80663031ca32d657f9caa404b6ec37"),
    _efficientnet_v2("b2", 260, 8_769_374, (2, 3, 3, 4, 6, 10), "1dfe2e7a5d45b6632553a8961ea609eb"),
    _efficientnet_v2("b3", 300, 12_930_622, (2, 3, 3, 5, 7, 12), "f6abf7b5849ac99a89b50dd3fd532856"),
    _efficientnet_v2("s", 384, 20_331_360, (2, 4, 4, 6, 9, 15), "af0682fb74e8c54910f2d4393339c070"),
    _convnext(
        "tiny", 27_820_128, (3, 3, 9, 3), "d547c096cabd03329d7be5562c5e14798aa39ed24b474157cef5e85ab9e49ef1"
    ),
    _convnext(
        "small", 49_454_688, (3, 3, 27, 3), "6fc8009faa2f00c1c1dfce59feea9b0745eb260a7dd11bee65c8e20843da6eab"
    ),
    Backbone(
        name="nasnet_mobile",
        display_name="NASNetMobile",
        native_input_size=224,
        preprocessing="tf",
        blocks=boundaries.NASNET_MOBILE,
        clean_cuts=False,
        num_parameters=4_269_716,
        license="Apache-2.0",
        source="https://arxiv.org/abs/1707.07012",
        imagenet=ImageNetFile(
            url=f"{KERAS_FILES}nasnet/NASNet-mobile-no-top.h5",
            file_name="nasnet_mobile_no_top.h5",
            file_hash="1ed92395b5b598bdda52abe5c0dbfd63",
        ),
    ),
)
