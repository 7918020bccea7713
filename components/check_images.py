"""Component `check_images`; see `kubegraft.data.ingest.check_images`."""

from kfp import dsl

from components._images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def check_images(
    images_digest: dsl.OutputPath(str),
    metrics: dsl.Output[dsl.Metrics],
    seed: int,
    source: str,
    validation_fraction: float,
    test_fraction: float,
    max_bad_fraction: float,
):
    """Read the images and tell their digest, so that KFP's cache sees whether they have changed.

    Args:
        images_digest: Digest that the dataset will have.
        metrics: Numbers of images found, accepted and quarantined.

    The other arguments are the fields of `kubegraft.config.IngestConfig`.
    """
    arguments = locals()
    from pathlib import Path

    from kubegraft.config import IngestConfig, from_arguments
    from kubegraft.data.ingest import check_images as run
    from kubegraft.processes import exit_on_error

    with exit_on_error("ingest"):
        result = run(from_arguments(IngestConfig, arguments))
        for name, value in result.metrics.items():
            metrics.log_metric(name, value)
        Path(images_digest).parent.mkdir(parents=True, exist_ok=True)
        Path(images_digest).write_text(result.digest)
