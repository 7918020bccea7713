"""Component `fine_tune`; see `kubegraft.training.fine_tune`."""

from kfp import dsl

from components._images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def fine_tune(
    dataset: dsl.Input[dsl.Dataset],
    dataset_digest: str,
    head_model: dsl.Input[dsl.Model],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    required_accelerators: int,
    seed: int,
    batch_size: int,
    num_epochs: int,
    learning_rate: float,
    weight_decay: float,
    label_smoothing: float,
    class_weights: str,
    augmentation: str,
    augmentation_strength: float,
    gradient_clip_norm: float,
    patience: int,
    time_budget_seconds: float,
    checkpoint_interval_seconds: float,
    mixed_precision: str,
    num_blocks: int,
    unfreeze_fraction: float,
    rate_decay: float,
    warmup_fraction: float,
):
    """Train the last blocks of the backbone further, never to a worse model.

    Args:
        dataset: Ingested dataset, a directory with `manifest.json`.
        dataset_digest: Digest of the dataset; makes KFP's cache see changed images.
        head_model: Output of `train_head`.
        model: Model directory: `model.keras`, its metadata and the histories of both phases.
        metrics: Validation results before and after.
        required_accelerators: Accelerators that there must be; 0 takes what there is.

    The other arguments are the fields of `kubegraft.config.FineTuneConfig`.
    """
    arguments = locals()
    from kubegraft.accelerators import require_accelerators
    from kubegraft.config import FineTuneConfig, from_arguments
    from kubegraft.processes import exit_on_error
    from kubegraft.stage import require_digest
    from kubegraft.training.fine_tune import fine_tune as run

    with exit_on_error("fine_tune"):
        require_accelerators(required_accelerators)
        require_digest(dataset.path, dataset_digest)
        result = run(dataset.path, head_model.path, model.path, from_arguments(FineTuneConfig, arguments))
        for name, value in result.metrics.items():
            metrics.log_metric(name, value)
        model.metadata.update(result.provenance)
