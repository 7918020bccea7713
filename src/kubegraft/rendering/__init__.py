"""Kubernetes manifests for clusters without Kubeflow, as plain values; `manifests/samples` has the same by hand."""
