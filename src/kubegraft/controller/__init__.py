"""The operator: TransferJobs become JobSets, TransferSchedules become TransferJobs.

Where things are, from the outside in:

    handlers, cluster, ...   watch the API and carry out actions; decide nothing (the only part that knows a cluster)
    reconcile                TransferJob: what is there -> what to do next; pure, total
    schedule                 TransferSchedule: likewise; when and why a job is made
      spec                   the resource's spec as typed values, and as the config file that the pods read
      jobset                 the JobSet and ConfigMap that a TransferJob becomes
      failures               what a pod's end or a pending pod means, in a reason and a message with the fix
      status, conditions     the status that people read; times change only when the state does
      ticks                  cron expressions in a time zone
    observed, actions,       what goes into and comes out of the two pure functions
      settings
    crd, schema, rules       the CustomResourceDefinitions, generated from the config's dataclasses
      (`python -m kubegraft.controller.crd` writes manifests/crds/ and the table of fields in the docs)

Reading order for a newcomer: `observed`, `actions`, `reconcile`, then docs/adr/0018-operator.md for the reasons.
Nothing here but `handlers` and `cluster` imports kopf or kubernetes, and nothing imports TensorFlow.
"""
