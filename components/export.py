"""Component `export`; see `kubegraft.export.export`."""

from kfp import dsl

from components._images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def export(
    dataset: dsl.Input[dsl.Dataset],
    dataset_digest: str,
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    export_model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    seed: int,
    formats: list,
    tolerance: float,
    num_verification_images: int,
):
    """Write the model for serving, and prove in a fresh process that it answers like the model.

    Args:
        dataset: Ingested dataset, a directory with `manifest.json`.
        dataset_digest: Digest of the dataset; makes KFP's cache see changed images.
        model: Model to export.
        evaluation: Its evaluation, which travels with the export.
        export_model: Directory with `model.keras`, `saved_model/` and `verification.json`.
        metrics: Largest difference from the model, by format.

    The other arguments are the fields of `kubegraft.config.ExportConfig`.
    """
    arguments = locals()
    from kubegraft.config import ExportConfig, from_arguments
    from kubegraft.export.export import export as run
    from kubegraft.processes import exit_on_error
    from kubegraft.stage import require_digest

    with exit_on_error("export"):
        require_digest(dataset.path, dataset_digest)
        config = from_arguments(ExportConfig, arguments)
        result = run(dataset.path, model.path, evaluation.path, export_model.path, config)
        for name, value in result.metrics.items():
            metrics.log_metric(name, value)
        export_model.metadata.update(result.provenance)
