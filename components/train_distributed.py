"""Component `train_distributed`; see `kubegraft.transfer_job_client`."""

from kfp import dsl

from components._images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def train_distributed(
    metrics: dsl.Output[dsl.Metrics],
    model_uri: dsl.OutputPath(str),
    job_namespace: str,
    source: str,
    backbone: str,
    seed: int,
    nodes: int,
    accelerators_per_node: int,
    accelerator_resource: str,
    node_selector: dict,
    tolerations: list,
    training_image: str,
    claim: str,
    publish: str,
    queue_name: str,
    further: dict,
    keep_on_stop: bool,
):
    """Train on several nodes: make a TransferJob, and follow it to its end.

    Args:
        metrics: Accuracies on the validation and test splits.
        model_uri: Where the exported model is.
        job_namespace: Namespace of the job; empty for this task's.
        source: Images, as in the config file's `ingest.source`.
        backbone: As in the config file's `head.backbone`.
        seed: As in the config file.
        nodes: Number of workers.
        accelerators_per_node: Accelerators of each worker.
        accelerator_resource: Their resource name.
        node_selector: Labels of the workers' nodes.
        tolerations: Taints of the workers' nodes.
        training_image: Image of the workers; empty for the operator's default.
        claim: PersistentVolumeClaim that all pods of the job share.
        publish: Path or bucket for the results; empty for the volume alone.
        queue_name: Kueue's queue; empty for none.
        further: Anything else of a TransferJob's `spec`.
        keep_on_stop: Whether a terminated run leaves the job suspended, and does not delete it.
    """
    given = locals()
    from pathlib import Path

    from kubegraft.processes import exit_on_error
    from kubegraft.transfer_job_client import train, wanted_of

    with exit_on_error("distributed"):
        outcome = train(wanted_of(given))
        for name, value in outcome.metrics.items():
            metrics.log_metric(name, value)
        Path(model_uri).parent.mkdir(parents=True, exist_ok=True)
        Path(model_uri).write_text(outcome.model_uri)
