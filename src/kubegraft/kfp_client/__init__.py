"""What `kubegraft submit` and `kubegraft schedule` do with the API of Kubeflow Pipelines; imports kfp when called."""
