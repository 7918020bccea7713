"""Component `train_head`; see `kubegraft.training.head`."""

from kfp import dsl

from components._images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def train_head(
    dataset: dsl.Input[dsl.Dataset],
    dataset_digest: str,
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
    backbone: str,
    weights: str,
    weights_sha256: str,
    input_size: int,
    head: str,
    features: str,
    hidden_units: list,
    dropout: float,
    batch_norm: bool,
    solver: str,
    search_seconds: float,
    num_blocks: int,
    unfreeze_fraction: float,
):
    """Train a head on a frozen backbone.

    Args:
        dataset: Ingested dataset, a directory with `manifest.json`.
        dataset_digest: Digest of the dataset; makes KFP's cache see changed images.
        model: Model directory: `model.keras`, its metadata and history.
        metrics: Validation results.
        required_accelerators: Accelerators that there must be; 0 takes what there is.
        num_blocks: As of `fine_tune`, which finds what it needs of the frozen blocks in the feature cache.
        unfreeze_fraction: The same.

    The other arguments are the fields of `kubegraft.config.HeadConfig`.
    """
    arguments = locals()
    from kubegraft.accelerators import require_accelerators
    from kubegraft.config import FineTuneConfig, HeadConfig, from_arguments
    from kubegraft.processes import exit_on_error
    from kubegraft.stage import require_digest
    from kubegraft.training.head import train_head as run

    with exit_on_error("train_head"):
        require_accelerators(required_accelerators)
        require_digest(dataset.path, dataset_digest)
        next_config = FineTuneConfig(num_blocks=num_blocks, unfreeze_fraction=unfreeze_fraction)
        result = run(dataset.path, model.path, from_arguments(HeadConfig, arguments), next_config)
        for name, value in result.metrics.items():
            metrics.log_metric(name, value)
        model.metadata.update(result.provenance)
