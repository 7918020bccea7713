"""Component `evaluate`; see `kubegraft.evaluation.evaluate`."""

from kfp import dsl

from components._images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def evaluate(
    dataset: dsl.Input[dsl.Dataset],
    dataset_digest: str,
    model: dsl.Input[dsl.Model],
    reference_model: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    classification_metrics: dsl.Output[dsl.ClassificationMetrics],
    report: dsl.Output[dsl.HTML],
    seed: int,
    num_bootstrap_samples: int,
    confidence_level: float,
    num_calibration_bins: int,
    num_worst_images: int,
):
    """Report the model on the test split, beside the model before fine-tuning.

    Args:
        dataset: Ingested dataset, a directory with `manifest.json`.
        dataset_digest: Digest of the dataset; makes KFP's cache see changed images.
        model: Model to report.
        reference_model: Model to compare it with.
        evaluation: Directory with `metrics.json`, `predictions.jsonl` and `report.html`.
        metrics: Accuracy and more, with confidence intervals.
        classification_metrics: Confusion matrix.
        report: The report as a page.

    The other arguments are the fields of `kubegraft.config.EvaluateConfig`.
    """
    arguments = locals()
    import shutil

    import kubegraft.evaluation.evaluate as stage
    from kubegraft.config import EvaluateConfig, from_arguments
    from kubegraft.processes import exit_on_error
    from kubegraft.stage import require_digest

    with exit_on_error("evaluate"):
        require_digest(dataset.path, dataset_digest)
        config = from_arguments(EvaluateConfig, arguments)
        result = stage.evaluate(dataset.path, model.path, evaluation.path, config, reference_model.path)
        for name, value in result.metrics.items():
            metrics.log_metric(name, value)
        classification_metrics.log_confusion_matrix(*stage.confusion_matrix_of(evaluation.path))
        shutil.copyfile(f"{evaluation.path}/report.html", report.path)
        evaluation.metadata.update(result.provenance)
