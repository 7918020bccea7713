"""Component `ingest`; see `kubegraft.data.ingest`."""

from kfp import dsl

from components._images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def ingest(
    dataset: dsl.Output[dsl.Dataset],
    dataset_digest: dsl.OutputPath(str),
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    images_digest: str,
    seed: int,
    source: str,
    validation_fraction: float,
    test_fraction: float,
    max_bad_fraction: float,
):
    """Turn a folder of labelled images into a dataset with a digest.

    Args:
        dataset: Dataset directory: shards, manifest, quarantine list.
        dataset_digest: Digest of the dataset, for the tasks that follow.
        metrics: Numbers of images found, accepted and quarantined.
        report: What was found, as a page.
        images_digest: Digest that it must have; makes KFP's cache see changed images. "" for any.

    The other arguments are the fields of `kubegraft.config.IngestConfig`.
    """
    arguments = locals()
    import shutil
    from pathlib import Path

    from kubegraft.config import IngestConfig, from_arguments
    from kubegraft.data.ingest import ingest as run
    from kubegraft.processes import exit_on_error

    with exit_on_error("ingest"):
        result = run(dataset.path, from_arguments(IngestConfig, arguments), images_digest)
        for name, value in result.metrics.items():
            metrics.log_metric(name, value)
        Path(dataset_digest).parent.mkdir(parents=True, exist_ok=True)
        Path(dataset_digest).write_text(result.digest)
        shutil.copyfile(f"{dataset.path}/report.html", report.path)
        dataset.metadata.update(result.provenance)
