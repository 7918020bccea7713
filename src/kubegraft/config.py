"""What a user may choose, one frozen dataclass a stage, checked when it is made.

The defaults here are the only ones: pipelines, components, the command line and the config file all take
them from this module (docs/architecture.md, "Config flow"). Two values mean "the recipe chooses from the
dataset": `AUTO` (-1) for a number and `"auto"` for a name; KFP has no way to pass "nothing".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeVar

from kubegraft.errors import ConfigError, suggestion

AUTO: Final = -1
AUTO_NAME: Final = "auto"
# What the clients of buckets read. Tasks on Kubeflow get them from a Secret, whose keys KFP wants named; it need not
# have all.
CREDENTIAL_VARIABLES: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "STORAGE_EMULATOR_HOST",
)

HEADS: Final = ("linear", "mlp")
FEATURES: Final = (AUTO_NAME, "last", "levels")
SOLVERS: Final = (AUTO_NAME, "lbfgs", "adamw")
# What only AdamW uses: a user who sets one of these wants it.
ADAMW_FIELDS: Final = ("learning_rate", "num_epochs", "patience")
CLASS_WEIGHTS: Final = (AUTO_NAME, "none", "balanced")
MIXED_PRECISION: Final = (AUTO_NAME, "on", "off")
TRANSFORMS: Final = ("flip", "crop", "rotation", "colour", "randaugment", "mixup")
EXPORT_FORMATS: Final = ("keras", "saved_model")


def option(default: Any, help_text: str) -> Any:
    """Return a dataclass field whose `help_text` is what the command line and the KFP UI show."""
    return dataclasses.field(default=default, metadata={"help": help_text})


def help_of(config: type | Any, field_name: str) -> str:
    """Return the help text of a field of one of this module's dataclasses."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    return str(fields[field_name].metadata["help"])


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """What all stages share: the rules that a subclass states are checked when it is made."""

    seed: int = option(
        0, "Seed of every random choice; the same seed on the same data gives the same result."
    )

    # name -> (lowest, highest, lowest excluded), checked unless the value is AUTO and AUTO is allowed.
    ranges: ClassVar[dict[str, tuple[float, float, bool]]] = {}
    autos: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Check types, then ranges.

        Raises:
            ConfigError: If a field breaks its rule.
        """
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _coerced(field, getattr(self, field.name)))
        for name, (low, high, open_low) in {"seed": (0, 2**31 - 1, False), **self.ranges}.items():
            value = getattr(self, name)
            if name in self.autos and value == AUTO:
                continue
            if not (low < value if open_low else low <= value) or value > high:
                bracket = "(" if open_low else "["
                auto = f", or {AUTO} to let the recipe choose" if name in self.autos else ""
                raise ConfigError(
                    f"`{name}` must be in {bracket}{low:g}, {high:g}]{auto}. Received: {name}={value!r}. "
                    f"{help_of(type(self), name)}"
                )


def _coerced(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return `value` as the field's type; KFP hands over 3.0 for 3 inside lists, YAML lists for tuples."""
    kind = str(field.type)
    if kind.startswith("tuple"):
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise _wrong_type(field, value, "a list")
        items = tuple(value)
        return tuple(_coerced_number(field, item, int) for item in items) if "int" in kind else items
    if kind == "bool":
        if not isinstance(value, bool):
            raise _wrong_type(field, value, "true or false")
        return value
    if kind in ("int", "float"):
        if value == AUTO_NAME:
            value = AUTO
        return _coerced_number(field, value, int if kind == "int" else float)
    if not isinstance(value, str):
        raise _wrong_type(field, value, "text")
    return value


def _coerced_number(field: dataclasses.Field[Any], value: Any, kind: type) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong_type(field, value, "a whole number" if kind is int else "a number")
    if kind is int and value != int(value):
        raise _wrong_type(field, value, "a whole number")
    return kind(value)  # type: ignore[no-any-return]


def _wrong_type(field: dataclasses.Field[Any], value: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"`{field.name}` must be {expected}. Received: {field.name}={value!r}. {field.metadata.get('help', '')}"
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"`{name}` must be one of {', '.join(map(repr, allowed))}. Received: {name}={value!r}."
            f"{suggestion(value, allowed)}"
        )


def _check_transforms(augmentation: str) -> None:
    if augmentation in (AUTO_NAME, "none"):
        return
    for transform in augmentation.split(","):
        _one_of("augmentation", transform.strip(), (*TRANSFORMS, AUTO_NAME, "none"))
        if transform.strip() in (AUTO_NAME, "none"):
            raise ConfigError(
                f"`augmentation` can't combine {transform.strip()!r} with transforms. Received: "
                f"augmentation={augmentation!r}. Name the transforms only, or {transform.strip()!r} alone."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestConfig(StageConfig):
    """Where the images are and how they are split."""

    source: str = option(
        "sample://digits",
        "Folder or archive (.zip, .tar, .tar.gz) of labelled images: train/<class>/*.jpg with "
        "validation/<class>/ and test/<class>/ if you have them, or one folder of <class>/*.jpg to split. "
        "A path, or an http(s)://, gs:// or s3:// URI. sample://digits needs no data at all.",
    )
    validation_fraction: float = option(
        0.15, "Fraction of each class held out to choose models by; used only without a validation folder."
    )
    test_fraction: float = option(
        0.1, "Fraction of each class held out for the final report; used only without a test folder."
    )
    max_bad_fraction: float = option(
        0.5, "The run stops if more than this fraction of the files can't be used as images."
    )

    ranges = {  # noqa: RUF012 - ClassVar of the base
        "validation_fraction": (0, 0.5, True),
        "test_fraction": (0, 0.5, True),
        "max_bad_fraction": (0, 1, False),
    }

    def __post_init__(self) -> None:
        """Check the fields; see the base class."""
        StageConfig.__post_init__(self)
        if not self.source.strip():
            raise ConfigError("`source` must name a folder or archive of images. Received: source=''.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig(StageConfig):
    """What head training and fine-tuning share."""

    batch_size: int = option(AUTO, "Images in a global batch, over all devices; -1 lets the recipe choose.")
    num_epochs: int = option(AUTO, "Most passes over the training split; -1 lets the recipe choose.")
    learning_rate: float = option(AUTO, "Peak learning rate; -1 lets the recipe choose.")
    weight_decay: float = option(
        AUTO,
        "Decoupled weight decay of kernels; -1 lets the recipe choose. With solver 'lbfgs' the factor of half "
        "the squared kernel beside the mean loss; -1 then means the best of a range on validation.",
    )
    label_smoothing: float = option(AUTO, "Label smoothing in [0, 1); -1 lets the recipe choose.")
    class_weights: str = option(
        AUTO_NAME,
        "How classes of different size count: 'balanced' weighs each class the same, 'none' each image; "
        "'auto' balances when the largest class has more than three times the images of the smallest.",
    )
    augmentation: str = option(
        AUTO_NAME,
        "Comma-separated random transforms of training images: flip, crop, rotation, colour, randaugment, "
        "mixup; 'none' for none, 'auto' lets the recipe choose.",
    )
    augmentation_strength: float = option(0.5, "How strong the transforms are, from 0 (none) to 1.")
    gradient_clip_norm: float = option(
        1.0, "Largest norm of the whole gradient; larger ones are scaled down to it. 0 turns clipping off."
    )
    patience: int = option(
        AUTO, "Epochs without a better validation result before training stops; -1 lets the recipe choose."
    )
    time_budget_seconds: float = option(
        0, "Training stops after this many seconds and keeps its best epoch; 0 means no limit."
    )
    checkpoint_interval_seconds: float = option(
        20,
        "Seconds between checkpoints within an epoch; one is written after every epoch of a second or more.",
    )
    mixed_precision: str = option(
        AUTO_NAME, "Compute in 16 bits: 'on', 'off', or 'auto' for GPUs that are built for it."
    )

    ranges = {  # noqa: RUF012 - ClassVar of the base
        "batch_size": (1, 65536, False),
        "num_epochs": (0, 100_000, False),
        "learning_rate": (0, 1, True),
        "weight_decay": (0, 10, False),
        "label_smoothing": (0, 0.5, False),
        "augmentation_strength": (0, 1, False),
        "gradient_clip_norm": (0, 1e9, False),
        "patience": (1, 100_000, False),
        "time_budget_seconds": (0, 1e9, False),
        "checkpoint_interval_seconds": (0, 1e9, False),
    }
    autos = frozenset(
        {"batch_size", "num_epochs", "learning_rate", "weight_decay", "label_smoothing", "patience"}
    )

    def __post_init__(self) -> None:
        """Check the fields; see the base class."""
        StageConfig.__post_init__(self)
        _one_of("class_weights", self.class_weights, CLASS_WEIGHTS)
        _one_of("mixed_precision", self.mixed_precision, MIXED_PRECISION)
        _check_transforms(self.augmentation)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig(TrainingConfig):
    """Which backbone, which head, and how the head is trained while the backbone is frozen."""

    backbone: str = option(
        "efficientnet_lite0", "Pretrained feature extractor; `kubegraft backbones` lists all."
    )
    weights: str = option(
        "imagenet",
        "Weights the backbone starts from: 'imagenet', 'none' (random), or a path or URI of a .weights.h5 "
        "or .keras file.",
    )
    weights_sha256: str = option(
        "", "Expected SHA-256 of the weights file, 64 hex digits; '' skips the check."
    )
    input_size: int = option(
        AUTO, "Side in pixels that images are resized to; -1 lets the recipe choose from the images' size."
    )
    head: str = option("linear", "Layers put on the backbone: 'linear' (one dense layer) or 'mlp'.")
    features: str = option(
        AUTO_NAME,
        "What the head sees: 'last' (the last feature map, averaged), or 'levels' (feature maps at a quarter, half and "
        "three quarters of the depth too); 'auto' lets the recipe choose.",
    )
    hidden_units: tuple[int, ...] = option((256,), "Units of each hidden layer of an 'mlp' head.")
    dropout: float = option(AUTO, "Fraction of head inputs dropped in training; -1 lets the recipe choose.")
    batch_norm: bool = option(False, "Whether an 'mlp' head normalises each hidden layer by batch.")
    solver: str = option(
        AUTO_NAME,
        "How the head is fitted: 'lbfgs' solves a linear head on unaugmented images to its optimum, 'adamw' "
        "trains any head in epochs; 'auto' takes 'lbfgs' where it can, unless a field is set that only AdamW "
        "uses (learning_rate, num_epochs, patience, weight_decay, dropout).",
    )
    search_seconds: float = option(
        0,
        "Seconds in which linear and 'mlp' heads of several sizes are compared by cross-validation on the "
        "training features; the best is trained. 0 trains the head that is given.",
    )

    ranges = {  # noqa: RUF012 - ClassVar of the base
        **TrainingConfig.ranges,
        "input_size": (16, 4096, False),
        "dropout": (0, 0.95, False),
        "search_seconds": (0, 1e9, False),
    }
    autos = TrainingConfig.autos | {"input_size", "dropout"}

    def __post_init__(self) -> None:
        """Check the fields; see the base class."""
        TrainingConfig.__post_init__(self)
        _one_of("head", self.head, HEADS)
        _one_of("features", self.features, FEATURES)
        _one_of("solver", self.solver, SOLVERS)
        self._check_solver()
        if any(units < 1 for units in self.hidden_units) or (self.head == "mlp" and not self.hidden_units):
            raise ConfigError(
                "`hidden_units` must list the positive sizes of the hidden layers. Received: "
                f"hidden_units={list(self.hidden_units)!r}. For a head without hidden layers use head='linear'."
            )
        if self.weights_sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", self.weights_sha256):
            raise ConfigError(
                "`weights_sha256` must be 64 hex digits. Received: "
                f"weights_sha256={self.weights_sha256!r}. `sha256sum FILE` prints it."
            )

    def _check_solver(self) -> None:
        if self.search_seconds and (self.augmentation not in (AUTO_NAME, "none") or self.solver != AUTO_NAME):
            raise ConfigError(
                "`search_seconds` must be 0 where training images are augmented or the solver is set: heads are "
                "compared on features that are computed once, each with its own solver. Received: "
                f"search_seconds={self.search_seconds:g}, augmentation={self.augmentation!r}, "
                f"solver={self.solver!r}. Use augmentation='none' and solver='auto', or search_seconds=0."
            )
        if self.solver != "lbfgs":
            return
        unused = [name for name in ADAMW_FIELDS if getattr(self, name) != AUTO]
        if unused:
            raise ConfigError(
                f"`{unused[0]}` must be {AUTO} with solver='lbfgs', which solves for the head and has no "
                f"epochs. Received: {unused[0]}={getattr(self, unused[0])!r}. Leave it open, or use solver='adamw'."
            )
        if self.weight_decay == 0:
            raise ConfigError(
                "`weight_decay` must be above 0 with solver='lbfgs': without it the best kernel may be infinite. "
                "Received: weight_decay=0. Leave it at -1 to have it chosen on validation."
            )
        if self.head != "linear" or self.augmentation not in (AUTO_NAME, "none"):
            raise ConfigError(
                "`solver` must not be 'lbfgs' unless the head is linear and images are not augmented. Received: "
                f"solver='lbfgs', head={self.head!r}, augmentation={self.augmentation!r}. Use solver='auto'."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneConfig(TrainingConfig):
    """Which last blocks of the backbone are trained further, and how."""

    num_blocks: int = option(
        AUTO, "Last blocks of the backbone to unfreeze; 0 skips fine-tuning, -1 lets the recipe choose."
    )
    unfreeze_fraction: float = option(
        AUTO, "Instead of num_blocks: fraction of the backbone's blocks to unfreeze, counted from the last."
    )
    rate_decay: float = option(
        AUTO, "Factor by which the learning rate falls from each block to the one before; -1: recipe."
    )
    warmup_fraction: float = option(
        0.1,
        "Fraction of all steps in which the rate rises linearly to its peak, before it falls as a cosine.",
    )

    ranges = {  # noqa: RUF012 - ClassVar of the base
        **TrainingConfig.ranges,
        "num_blocks": (0, 10_000, False),
        "unfreeze_fraction": (0, 1, False),
        "rate_decay": (0, 1, True),
        "warmup_fraction": (0, 0.9, False),
    }
    autos = TrainingConfig.autos | {"num_blocks", "unfreeze_fraction", "rate_decay"}

    def __post_init__(self) -> None:
        """Check the fields; see the base class."""
        TrainingConfig.__post_init__(self)
        if self.num_blocks != AUTO and self.unfreeze_fraction != AUTO:
            raise ConfigError(
                "`num_blocks` and `unfreeze_fraction` say the same thing, so only one may be given. Received: "
                f"num_blocks={self.num_blocks!r}, unfreeze_fraction={self.unfreeze_fraction!r}. Leave one at -1."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """How the test split is reported."""

    num_bootstrap_samples: int = option(1000, "Resamples of the test split behind each confidence interval.")
    confidence_level: float = option(0.95, "Coverage of the confidence intervals, in (0, 1).")
    num_calibration_bins: int = option(15, "Equal-width confidence bins of the calibration error.")
    num_worst_images: int = option(24, "Thumbnails of the most wrong test images in the report.")

    ranges = {  # noqa: RUF012 - ClassVar of the base
        "num_bootstrap_samples": (10, 1_000_000, False),
        "confidence_level": (0, 0.9999, True),
        "num_calibration_bins": (1, 1000, False),
        "num_worst_images": (0, 1000, False),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig(StageConfig):
    """Which files are written for serving, and how alike they must answer."""

    formats: tuple[str, ...] = option(
        EXPORT_FORMATS, "Formats to write: 'keras' (a .keras file) and 'saved_model' (raw image bytes in)."
    )
    tolerance: float = option(
        1e-5, "Largest difference in any probability between the trained model and its export."
    )
    num_verification_images: int = option(16, "Images that the export must answer in a fresh process.")

    ranges = {  # noqa: RUF012 - ClassVar of the base
        "tolerance": (0, 1, True),
        "num_verification_images": (1, 10_000, False),
    }

    def __post_init__(self) -> None:
        """Check the fields; see the base class."""
        StageConfig.__post_init__(self)
        if not self.formats:
            raise ConfigError("`formats` must name at least one format. Received: formats=[].")
        for name in self.formats:
            _one_of("formats", name, EXPORT_FORMATS)


Config = TypeVar("Config", bound=StageConfig)


def from_arguments(config_type: type[Config], arguments: Mapping[str, Any]) -> Config:
    """Return a config made of those `arguments` that are its fields; every field must be among them.

    For adapters whose function arguments have the names of the fields: `from_arguments(HeadConfig, locals())`.

    Raises:
        ConfigError: If a field is missing, so that no default applies unseen, or a value breaks its rule.
    """
    names = [field.name for field in dataclasses.fields(config_type)]
    missing = [name for name in names if name not in arguments]
    if missing:
        raise ConfigError(
            f"`{missing[0]}` must be given for {config_type.__name__}. Received: arguments "
            f"{sorted(arguments)!r}, without {missing!r}. Pass every field by name."
        )
    return config_type(**{name: arguments[name] for name in names})
