"""The operator: TransferJobs become JobSets, TransferSchedules become TransferJobs.

Where things are, from the outside in:

    handlers, cluster, ...   watch the API and carry out actions; decide nothing (the only part that knows a cluster)
    reconcile                TransferJob: what is there -> what to do next; pure, total
      view, running, ending  its parts: what was seen, the condition `Running`, how a job ends
      spec                   the resource's spec as typed values, and as the config file that the pods read
      jobset, pod_template   the JobSet and ConfigMap that a TransferJob becomes
      job_pods, failures     pods as they fare; what their end or waiting means, in a reason and a message with the fix
      status, conditions     the status that people read; times change only when the state does
    schedule                 TransferSchedule: likewise; when and why a job is made
      ticks, data_look       cron expressions in a time zone; the Job that looks whether the data has changed
    observed, actions,       what goes into and comes out of the two pure functions
      settings
    crd                      the CustomResourceDefinitions, generated from the config's dataclasses
      schema, cluster_fields, status_schema, rules, fields_table
                             (`python -m kubegraft.controller.crd` writes manifests/crds/ and the table of fields)

Reading order for a newcomer: `observed`, `actions`, `reconcile`, then docs/adr/0018-operator.md for the reasons.
Nothing here but `handlers` and `cluster` imports kopf or kubernetes, and nothing imports TensorFlow.
"""
