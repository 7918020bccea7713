"""The pipeline for several nodes: one task, which has the operator train, evaluate and export (docs/operator.md)."""

from kfp import dsl, kubernetes

from components import train_distributed
from kubegraft.config import HeadConfig, IngestConfig
from pipelines._placement import USER
from pipelines._profiles import profile

INGEST = IngestConfig()
HEAD = HeadConfig()


@dsl.pipeline(
    name="distributed-transfer-learning",
    display_name="Transfer learning on images, on several nodes",
    description="A folder of labelled images in, a tested classifier out, trained by a TransferJob.",
)
def distributed_transfer_learning(
    source: str = INGEST.source,
    backbone: str = HEAD.backbone,
    seed: int = HEAD.seed,
    nodes: int = 2,
    claim: str = "kubegraft-work",
    publish: str = "",
    accelerator_type: str = "nvidia.com/gpu",
    accelerator_count: int = 0,
    node_selector: dict = {},
    tolerations: list = [],
    queue_name: str = "",
    job_namespace: str = "",
    spec: dict = {},
    keep_on_stop: bool = False,
) -> None:
    """A folder of labelled images in, a tested classifier out, trained by a TransferJob.

    Args:
        source: Images: a path on the job's volume (/artifacts/...), or a URI that its pods can read.
        backbone: Pretrained network; `kubegraft backbones` lists them.
        seed: Decides every random choice; the same seed, images and config give the same model.
        nodes: Number of workers that train together, 1 to 64.
        claim: PersistentVolumeClaim that all pods of the job share; its access mode must fit the nodes.
        publish: Where the results go besides: gs://, s3:// or a path; empty for the volume alone.
        accelerator_type: Kubernetes resource name of the accelerators of each worker.
        accelerator_count: Accelerators of each worker; 0 asks for none.
        node_selector: Labels that the workers' nodes must have, for example {"pool": "gpu"}.
        tolerations: Taints that the workers tolerate, as a list of Kubernetes tolerations.
        queue_name: Queue of Kueue that admits the job; empty for none.
        job_namespace: Namespace of the job; empty for that of this run.
        spec: Anything else of a TransferJob's spec, for example {"fine_tune": {"num_epochs": 8}, "maxRestarts": 5}.
        keep_on_stop: Whether terminating the run suspends the job and leaves it; else the job is deleted.
    """
    task = train_distributed(
        job_namespace=job_namespace,
        source=source,
        backbone=backbone,
        seed=seed,
        nodes=nodes,
        accelerators_per_node=accelerator_count,
        accelerator_resource=accelerator_type,
        node_selector=node_selector,
        tolerations=tolerations,
        training_image=profile().training_image,
        claim=claim,
        publish=publish,
        queue_name=queue_name,
        further=spec,
        keep_on_stop=keep_on_stop,
    )
    # It waits, and follows a log. What it made goes on if its node is lost, and the other try finds it.
    task.set_cpu_request("100m").set_cpu_limit("1").set_memory_request("256Mi").set_memory_limit("1Gi")
    task.set_retry(num_retries=2, backoff_duration="30s", backoff_factor=2.0)
    task.set_caching_options(False)  # images change under the same name, which KFP's cache can't see
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.empty_dir_mount(task, "tmp", "/tmp")
    kubernetes.use_field_path_as_env(task, "KUBEGRAFT_RUN_NAME", "metadata.labels['pipeline/runid']")
