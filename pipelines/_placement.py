"""Where and how tasks run in a cluster; `kfp.local` ignores all of it."""

from typing import Any

from kfp import kubernetes

from kubegraft.config import CREDENTIAL_VARIABLES
from pipelines._profiles import WORK_DIR, profile

# The numeric non-root user of the image; Pod Security "restricted" wants it said.
USER = 65532


def prepared(task: Any) -> Any:
    """Give a task its resources, its user, scratch space, and another try when its node is lost.

    KFP's own install does not retry a step that failed by itself, whatever is said here: transient faults are
    retried inside the step. This is for evicted pods and lost nodes. With a claim for the work directory the other
    try continues from the checkpoint of the one before; else it starts over.
    """
    task.set_cpu_request("1").set_cpu_limit("4").set_memory_request("4Gi").set_memory_limit("8Gi")
    task.set_retry(num_retries=2, backoff_duration="30s", backoff_factor=2.0)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.empty_dir_mount(task, "tmp", "/tmp")
    # Names the run in every line of the log; the label is on all pods of a run, and "" where there is none.
    kubernetes.use_field_path_as_env(task, "KUBEGRAFT_RUN_NAME", "metadata.labels['pipeline/runid']")
    if claim := profile().work_claim:
        kubernetes.mount_pvc(task, claim, WORK_DIR)
        task.set_env_variable("KUBEGRAFT_WORK_DIR", WORK_DIR)
        task.set_env_variable("KUBEGRAFT_CACHE", f"{WORK_DIR}/cache")
        task.set_env_variable("KUBEGRAFT_CACHE_BUDGET", "auto")
    if secret := profile().secret:
        kubernetes.use_secret_as_env(task, secret, {key: key for key in CREDENTIAL_VARIABLES}, optional=True)
    return task


def on_accelerators(
    task: Any, accelerator_type: Any, accelerator_count: Any, node_selector: Any, tolerations: Any
) -> Any:
    """Ask for accelerators, and for the shared memory that input pipelines and NCCL use beside them."""
    if image := profile().training_image:
        task.set_container_image(image)
    task.set_accelerator_type(accelerator_type).set_accelerator_limit(accelerator_count)
    kubernetes.add_node_selector_json(task, node_selector)
    kubernetes.add_toleration_json(task, tolerations)
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit="2Gi")
    return task
