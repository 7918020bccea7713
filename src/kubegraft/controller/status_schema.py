"""Schemas of the status of both resources."""

from __future__ import annotations

from typing import Final

from kubegraft.controller.schema import MAX_URI, Schema, integer, structure, text
from kubegraft.job_report import STAGES

MAX_MESSAGE: Final = 1024
MAX_ENDS: Final = 512
MAX_STALLED: Final = 10  # restarts in a row without progress; one more ends the job
METRICS: Final = {
    "validation_accuracy": (
        "validationAccuracy",
        "Fraction of the validation images that are classified rightly.",
    ),
    "test_accuracy": ("testAccuracy", "Fraction of the test images that are classified rightly."),
    "test_accuracy_low": ("testAccuracyLow", "Lower end of its confidence interval."),
    "test_accuracy_high": ("testAccuracyHigh", "Upper end of its confidence interval."),
    "images_per_second": ("imagesPerSecond", "Training images a second, over all nodes."),
    "scaling_efficiency": (
        "scalingEfficiency",
        "Images a second, as a fraction of nodes times those of one node.",
    ),
    "waiting_fraction": (
        "waitingFraction",
        "Fraction of the training time in which nodes waited for each other.",
    ),
}
_RESTARTS: Final = 10**6


def time(help_text: str) -> Schema:
    """Return the schema of a point in time."""
    return {"type": "string", "format": "date-time", "description": help_text}


def conditions() -> Schema:
    """Return the schema of a list of conditions, as metav1.Condition has them."""
    properties = {
        "type": text("CamelCase name.", length=316),
        "status": {
            "type": "string",
            "description": "Whether it holds.",
            "enum": ["True", "False", "Unknown"],
        },
        "observedGeneration": {
            "type": "integer",
            "format": "int64",
            "minimum": 0,
            "description": "Of the spec it is about.",
        },
        "lastTransitionTime": time("When `status` changed last."),
        "reason": text("CamelCase word for programs.", length=MAX_MESSAGE),
        "message": text("Sentences for people: what is, and how to fix what is wrong.", length=MAX_MESSAGE),
    }
    return {
        "type": "array",
        "description": "What is known to hold or not to hold.",
        "maxItems": 16,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": structure(
            "One condition.",
            properties,
            required=["type", "status", "lastTransitionTime", "reason", "message"],
        ),
    }


def _generation() -> Schema:
    return {
        "type": "integer",
        "format": "int64",
        "minimum": 0,
        "description": "Generation of the spec that this is about.",
    }


def job_status() -> Schema:
    """Return the schema of a TransferJob's `status`."""
    metrics = {name: text(help_text, length=32) for name, help_text in METRICS.values()}
    properties = {
        "conditions": conditions(),
        "observedGeneration": _generation(),
        "stage": {**text("Furthest stage that was begun."), "enum": ["", *STAGES]},
        "progress": integer("Percent of the whole job, in tens.", 0, 100),
        "restarts": integer("How often the pods were started again, for whatever reason.", 0, _RESTARTS),
        "uncountedRestarts": integer(
            "Those of them that did not count against maxRestarts: pods were killed or lost.", 0, _RESTARTS
        ),
        "restartsWithoutProgress": integer(
            "Uncounted restarts in a row in which the job did not go on; it fails after 10.",
            0,
            MAX_STALLED + 1,
        ),
        "exactProgress": integer("Percent of the whole job, as it was reported.", 0, 100),
        "lastEnds": text("How pods ended that did not end well, the last that were seen.", length=MAX_ENDS),
        "metrics": structure("Decimal numbers as text.", metrics),
        "modelUri": text("Where the exported model is.", length=MAX_URI),
        "datasetDigest": text("Digest of the dataset.", length=128),
        "acceleratorHours": text("Hours of accelerators that the training pods held, at least.", length=32),
        "earlierAcceleratorHours": text("The part of it before the last restart.", length=32),
        "startTime": time("When the job was let start, or let go on after it was suspended."),
        "completionTime": time("When it ended."),
        "jobSetName": text("Its JobSet."),
        "jobSetUid": text("Its JobSet's uid: one of a queue is made anew after a suspension.", length=64),
        "earlierRestarts": integer("Restarts by JobSets before that one.", 0, _RESTARTS),
        "earlierUncountedRestarts": integer(
            "Those of them that did not count against maxRestarts.", 0, _RESTARTS
        ),
    }
    return structure("What the operator knows of the job.", properties)


def schedule_status() -> Schema:
    """Return the schema of a TransferSchedule's `status`."""
    decision = {
        "time": time("The tick that it is about."),
        "ran": {"type": "boolean", "description": "Whether a job was made."},
        "reason": text("CamelCase word for programs.", length=64),
        "message": text("Why, for people.", length=MAX_MESSAGE),
        "jobName": text("The job that was made."),
    }
    active = {
        "type": "array",
        "description": "Names of jobs that have not ended.",
        "maxItems": 100,
        "x-kubernetes-list-type": "set",
        "items": {"type": "string", "maxLength": 253},
    }
    properties = {
        "conditions": conditions(),
        "observedGeneration": _generation(),
        "active": active,
        "lastScheduleTime": time("Last tick that was decided."),
        "lastRunTime": time("Last tick that made a job."),
        "nextScheduleTime": time("Next tick."),
        "lastDatasetDigest": text("Digest of the data of the last successful run.", length=128),
        "lastDecision": structure("What was decided last, and why.", decision),
    }
    return structure("What the operator knows of the schedule.", properties)
