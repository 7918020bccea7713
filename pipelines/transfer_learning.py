"""The pipeline: look at the images, ingest them, train a head, fine-tune, evaluate, export.

Run as it is on a laptop by `kubegraft run`, and compiled for a cluster by `python pipelines/compile.py`.
"""

from kfp import dsl

from components import check_images, evaluate, export, fine_tune, ingest, train_head
from kubegraft.config import EvaluateConfig, ExportConfig, FineTuneConfig, HeadConfig, IngestConfig
from pipelines._parameters import described
from pipelines._placement import on_accelerators, prepared

INGEST = IngestConfig()
HEAD = HeadConfig()
FINE_TUNE = FineTuneConfig()
EVALUATE = EvaluateConfig()
EXPORT = ExportConfig()


@dsl.pipeline(
    name="transfer-learning",
    display_name="Transfer learning on images",
    description="A folder of labelled images in, a tested and servable classifier out.",
)
@described
def transfer_learning(
    seed: int = HEAD.seed,
    mixed_precision: str = HEAD.mixed_precision,
    source: str = INGEST.source,
    validation_fraction: float = INGEST.validation_fraction,
    test_fraction: float = INGEST.test_fraction,
    max_bad_fraction: float = INGEST.max_bad_fraction,
    backbone: str = HEAD.backbone,
    weights: str = HEAD.weights,
    weights_sha256: str = HEAD.weights_sha256,
    input_size: int = HEAD.input_size,
    head: str = HEAD.head,
    features: str = HEAD.features,
    hidden_units: list = list(HEAD.hidden_units),
    dropout: float = HEAD.dropout,
    batch_norm: bool = HEAD.batch_norm,
    solver: str = HEAD.solver,
    search_seconds: float = HEAD.search_seconds,
    head_batch_size: int = HEAD.batch_size,
    head_num_epochs: int = HEAD.num_epochs,
    head_learning_rate: float = HEAD.learning_rate,
    head_weight_decay: float = HEAD.weight_decay,
    head_label_smoothing: float = HEAD.label_smoothing,
    head_class_weights: str = HEAD.class_weights,
    head_augmentation: str = HEAD.augmentation,
    head_augmentation_strength: float = HEAD.augmentation_strength,
    head_gradient_clip_norm: float = HEAD.gradient_clip_norm,
    head_patience: int = HEAD.patience,
    head_time_budget_seconds: float = HEAD.time_budget_seconds,
    head_checkpoint_interval_seconds: float = HEAD.checkpoint_interval_seconds,
    fine_tune_batch_size: int = FINE_TUNE.batch_size,
    fine_tune_num_epochs: int = FINE_TUNE.num_epochs,
    fine_tune_learning_rate: float = FINE_TUNE.learning_rate,
    fine_tune_weight_decay: float = FINE_TUNE.weight_decay,
    fine_tune_label_smoothing: float = FINE_TUNE.label_smoothing,
    fine_tune_class_weights: str = FINE_TUNE.class_weights,
    fine_tune_augmentation: str = FINE_TUNE.augmentation,
    fine_tune_augmentation_strength: float = FINE_TUNE.augmentation_strength,
    fine_tune_gradient_clip_norm: float = FINE_TUNE.gradient_clip_norm,
    fine_tune_patience: int = FINE_TUNE.patience,
    fine_tune_time_budget_seconds: float = FINE_TUNE.time_budget_seconds,
    fine_tune_checkpoint_interval_seconds: float = FINE_TUNE.checkpoint_interval_seconds,
    num_blocks: int = FINE_TUNE.num_blocks,
    unfreeze_fraction: float = FINE_TUNE.unfreeze_fraction,
    rate_decay: float = FINE_TUNE.rate_decay,
    warmup_fraction: float = FINE_TUNE.warmup_fraction,
    num_bootstrap_samples: int = EVALUATE.num_bootstrap_samples,
    confidence_level: float = EVALUATE.confidence_level,
    num_calibration_bins: int = EVALUATE.num_calibration_bins,
    num_worst_images: int = EVALUATE.num_worst_images,
    formats: list = list(EXPORT.formats),
    tolerance: float = EXPORT.tolerance,
    num_verification_images: int = EXPORT.num_verification_images,
    accelerator_type: str = "nvidia.com/gpu",
    accelerator_count: int = 0,
    node_selector: dict = {},
    tolerations: list = [],
) -> None:
    """A folder of labelled images in, a tested and servable classifier out."""
    images = {
        "source": source,
        "seed": seed,
        "validation_fraction": validation_fraction,
        "test_fraction": test_fraction,
        "max_bad_fraction": max_bad_fraction,
    }
    # Images change under the same URI, which KFP's cache can't see: always look, and hand on the digest. The cache
    # knows an artifact by an id that each run of its task makes anew, so the dataset must come from a cached task.
    check_task = check_images(**images)
    prepared(check_task).set_caching_options(False)
    ingest_task = ingest(images_digest=check_task.outputs["images_digest"], **images)
    dataset = {
        "dataset": ingest_task.outputs["dataset"],
        "dataset_digest": ingest_task.outputs["dataset_digest"],
    }
    # A component's own input must not be called `accelerator_count`: kfp gives a task that has an accelerator limit an
    # input of that name, with a placeholder as its value.
    head_task = train_head(
        **dataset,
        required_accelerators=accelerator_count,
        backbone=backbone,
        weights=weights,
        weights_sha256=weights_sha256,
        input_size=input_size,
        head=head,
        features=features,
        hidden_units=hidden_units,
        dropout=dropout,
        batch_norm=batch_norm,
        solver=solver,
        search_seconds=search_seconds,
        num_blocks=num_blocks,
        unfreeze_fraction=unfreeze_fraction,
        seed=seed,
        batch_size=head_batch_size,
        num_epochs=head_num_epochs,
        learning_rate=head_learning_rate,
        weight_decay=head_weight_decay,
        label_smoothing=head_label_smoothing,
        class_weights=head_class_weights,
        augmentation=head_augmentation,
        augmentation_strength=head_augmentation_strength,
        gradient_clip_norm=head_gradient_clip_norm,
        patience=head_patience,
        time_budget_seconds=head_time_budget_seconds,
        checkpoint_interval_seconds=head_checkpoint_interval_seconds,
        mixed_precision=mixed_precision,
    )
    fine_tune_task = fine_tune(
        **dataset,
        head_model=head_task.outputs["model"],
        required_accelerators=accelerator_count,
        seed=seed,
        batch_size=fine_tune_batch_size,
        num_epochs=fine_tune_num_epochs,
        learning_rate=fine_tune_learning_rate,
        weight_decay=fine_tune_weight_decay,
        label_smoothing=fine_tune_label_smoothing,
        class_weights=fine_tune_class_weights,
        augmentation=fine_tune_augmentation,
        augmentation_strength=fine_tune_augmentation_strength,
        gradient_clip_norm=fine_tune_gradient_clip_norm,
        patience=fine_tune_patience,
        time_budget_seconds=fine_tune_time_budget_seconds,
        checkpoint_interval_seconds=fine_tune_checkpoint_interval_seconds,
        mixed_precision=mixed_precision,
        num_blocks=num_blocks,
        unfreeze_fraction=unfreeze_fraction,
        rate_decay=rate_decay,
        warmup_fraction=warmup_fraction,
    )
    evaluate_task = evaluate(
        **dataset,
        model=fine_tune_task.outputs["model"],
        reference_model=head_task.outputs["model"],
        seed=seed,
        num_bootstrap_samples=num_bootstrap_samples,
        confidence_level=confidence_level,
        num_calibration_bins=num_calibration_bins,
        num_worst_images=num_worst_images,
    )
    export_task = export(
        **dataset,
        model=fine_tune_task.outputs["model"],
        evaluation=evaluate_task.outputs["evaluation"],
        seed=seed,
        formats=formats,
        tolerance=tolerance,
        num_verification_images=num_verification_images,
    )
    for task in (ingest_task, head_task, fine_tune_task, evaluate_task, export_task):
        prepared(task)
    for task in (head_task, fine_tune_task):
        on_accelerators(task, accelerator_type, accelerator_count, node_selector, tolerations)
