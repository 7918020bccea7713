"""What of an object is kept in memory: with a thousand jobs, the rest would be most of it."""

from __future__ import annotations

from typing import Any, Final

Object = dict[str, Any]

_METADATA: Final = (
    "name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "labels",
    "annotations", "ownerReferences", "finalizers",
)  # fmt: skip
# Of an annotation that kubectl leaves, as large as the object.
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
_POD: Final = ("nodeName", "restartPolicy", "terminationGracePeriodSeconds")
_CONTAINER: Final = ("name", "image", "resources")


def prune(found: Object) -> Object:
    """Return the parts of an object that the controller reads.

    Of a pod that is who made it, where it runs, and its status; of a JobSet, all but the pods' templates.
    """
    kept: Object = {name: found[name] for name in ("apiVersion", "kind", "status") if name in found}
    kept["metadata"] = _metadata(found["metadata"])
    if "spec" in found:
        kept["spec"] = _SPECS.get(found.get("kind", ""), dict)(found["spec"])
    return kept


def _metadata(metadata: Object) -> Object:
    kept: Object = {name: metadata[name] for name in _METADATA if name in metadata}
    if _LAST_APPLIED in kept.get("annotations", ()):
        kept["annotations"] = {k: v for k, v in kept["annotations"].items() if k != _LAST_APPLIED}
    return kept


def _pod(spec: Object) -> Object:
    kept: Object = {name: spec[name] for name in _POD if name in spec}
    kept["containers"] = [
        {name: one[name] for name in _CONTAINER if name in one} for one in spec.get("containers", ())
    ]
    return kept


def _jobset(spec: Object) -> Object:
    jobs = [
        {name: value for name, value in job.items() if name != "template"}
        for job in spec.get("replicatedJobs", ())
    ]
    return {**spec, "replicatedJobs": jobs}


def _job(spec: Object) -> Object:
    return {name: value for name, value in spec.items() if name != "template"}


_SPECS: Final = {"Pod": _pod, "JobSet": _jobset, "Job": _job}
