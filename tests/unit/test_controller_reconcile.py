"""What the operator does about a TransferJob, case by case."""

from datetime import timedelta

import pytest

from kubegraft.controller.actions import Apply, Delete, Event, PatchStatus, Requeue
from kubegraft.controller.conditions import find, timestamp
from kubegraft.controller.jobset import QUEUE_LABEL, config_map_name, jobset_name, render_jobset
from kubegraft.controller.observed import Observed
from kubegraft.controller.reconcile import reconcile
from kubegraft.job_report import Report
from tests.controller_world import (
    BAD_CONFIG,
    BAD_DATA,
    CRASH,
    DIVERGED,
    FULL_DISK,
    KILLED,
    NODE_LOST,
    OUT_OF_MEMORY,
    PEER_LOST,
    SETTINGS,
    START,
    WELL,
    Fate,
    condition,
    ended,
    last_report,
    pod_of,
    running,
    transfer_job,
)

NAME = jobset_name(transfer_job())


def jobset_of(job, conditions=(), suspend=None, **status):
    """Return the job's JobSet as the API has it."""
    made = render_jobset(job, SETTINGS)
    made["metadata"] |= {"uid": "uid-js", "resourceVersion": "7", "creationTimestamp": timestamp(START)}
    if suspend is not None:
        made["spec"]["suspend"] = suspend
    return {**made, "status": {**status, "conditions": list(conditions)}}


def seen(job, jobset=None, *, pods=(), seconds=60.0, config_map=True, **more):
    return Observed(
        job=job,
        jobset=jobset,
        config_map={"metadata": {"name": config_map_name(job)}} if config_map and jobset else None,
        pods=tuple(pods),
        now=START + timedelta(seconds=seconds),
        **more,
    )


def act(*arguments, **more):
    return reconcile(seen(*arguments, **more), SETTINGS)


def only(actions, kind):
    return [each for each in actions if isinstance(each, kind)]


def status_after(actions):
    (patch,) = only(actions, PatchStatus)
    return patch.status


def told(actions, kind="Running"):
    found = find(status_after(actions)["conditions"], kind)
    return found["status"], found["reason"], found["message"]


def with_status(job, actions):
    return {**job, "status": status_after(actions)}


def failed_jobset(job, role="train", reason="ReachedMaxRestarts", at=30, **status):
    when = START + timedelta(seconds=at)
    message = f"jobset failed (first failed job: {NAME}-{role}-0)"
    return jobset_of(job, [condition("Failed", "True", reason, when, message)], **status)


def end_pod(role, fate, **more):
    pod = running(pod_of(NAME, role, **more), START + timedelta(seconds=10))
    return ended(pod, fate, START + timedelta(seconds=25), last_report(role, fate))


# From nothing to running.


def test_a_new_job_gets_its_config_and_then_its_jobset():
    config_map, jobset, wait = act(transfer_job())
    assert (config_map.create, jobset.create) == (True, True)
    assert config_map.manifest["kind"] == "ConfigMap"
    assert jobset.manifest["metadata"]["name"] == NAME
    assert jobset.manifest["spec"]["suspend"] is False
    assert isinstance(wait, Requeue)


def test_what_the_schema_let_in_and_the_config_refuses_fails_the_job_at_once():
    actions = act(transfer_job(head={"solver": "lbfgs", "num_epochs": 3}))
    assert told(actions, "Failed")[:2] == ("True", "ConfigRejected")
    assert not only(actions, Apply) + only(actions, Delete)
    assert find(status_after(actions)["conditions"], "Admitted") == {}


def test_a_job_that_is_being_deleted_is_left_alone():
    job = transfer_job()
    job["metadata"]["deletionTimestamp"] = timestamp(START)
    assert act(job, jobset_of(job)) == ()


def test_a_suspended_job_gets_no_jobset():
    actions = act(transfer_job(suspend=True))
    assert told(actions, "Admitted")[:2] == ("False", "Suspended")
    assert not only(actions, Apply)


def test_a_refused_jobset_is_told_and_tried_again():
    events = ({"reason": "ApplyFailed", "message": "exceeded quota: pods"},)
    actions = act(transfer_job(), events=events)
    for kind in ("Admitted", "Running"):  # `kubectl get -o wide` shows the latter
        assert told(actions, kind)[:2] == ("False", "Forbidden")
    assert len(only(actions, Apply)) == 2
    events = ({"reason": "ApplyFailed", "message": "no matches for kind JobSet"},)
    assert told(act(transfer_job(), events=events), "Admitted")[1] == "CreationFailed"


def test_a_fresh_jobset_is_starting_and_its_creation_is_the_start():
    job = transfer_job()
    actions = act(job, jobset_of(job))
    status = status_after(actions)
    assert told(actions)[:2] == ("False", "Starting")
    assert told(actions, "Admitted")[:2] == ("True", "Started")
    assert status["startTime"] == timestamp(START)
    assert status["jobSetName"] == NAME
    assert status["observedGeneration"] == 1
    assert act(with_status(job, actions), jobset_of(job)) == (Requeue(120.0),)


def test_a_lost_config_map_is_made_again():
    job = transfer_job()
    (apply,) = only(act(job, jobset_of(job), config_map=False), Apply)
    assert apply.manifest["kind"] == "ConfigMap"


@pytest.mark.parametrize(
    ("role", "reason"), [("prepare", "Preparing"), ("train", "Training"), ("finish", "Finishing")]
)
def test_running_pods_say_which_part_runs(role, reason):
    job = transfer_job(nodes=2)
    pods = [running(pod_of(NAME, role), START)]
    assert told(act(job, jobset_of(job), pods=pods))[:2] == ("True", reason)


def test_between_two_parts_the_job_is_still_running():
    job = transfer_job()
    first = act(job, jobset_of(job), pods=[running(pod_of(NAME, "prepare"), START)])
    job = with_status(job, first)
    actions = act(job, jobset_of(job), pods=[end_pod("prepare", WELL)])
    assert told(actions)[:2] == ("True", "Preparing")
    assert status_after(actions)["datasetDigest"] == "d" * 64


def test_reports_of_logs_move_stage_and_progress_in_tens_and_never_back():
    job = transfer_job()
    pods = [running(pod_of(NAME, "train"), START)]
    pod = pods[0]["metadata"]["name"]
    reports = {pod: Report(stage="fine_tune", progress=55, metrics={"images_per_second": 10.0, "other": 1.0})}
    actions = act(job, jobset_of(job), pods=pods, reports=reports)
    status = status_after(actions)
    assert (status["stage"], status["progress"]) == ("fine_tune", 60)
    assert status["metrics"] == {"imagesPerSecond": "10.0000"}
    job = with_status(job, actions)
    for report in (
        Report(stage="fine_tune", progress=57),
        Report(stage="ingest", progress=90),
        Report(stage="x"),
    ):
        assert not only(act(job, jobset_of(job), pods=pods, reports={pod: report}), PatchStatus)


def test_accelerator_hours_add_up_over_restarts():
    job = transfer_job(accelerators={"count": 2})
    pods = [running(pod_of(NAME, "train"), START)]
    first = act(job, jobset_of(job), pods=pods, seconds=3600)
    assert status_after(first)["acceleratorHours"] == "2.00"
    job = with_status(job, first)
    pods = [running(pod_of(NAME, "train", attempt=1), START + timedelta(hours=1))]
    second = act(job, jobset_of(job, restarts=1), pods=pods, seconds=2 * 3600)
    assert status_after(second)["acceleratorHours"] == "4.00"
    assert status_after(second)["earlierAcceleratorHours"] == "2.00"


def test_accelerator_hours_grow_with_time_and_not_with_looks():
    job = transfer_job(accelerators={"count": 1})
    pods = [running(pod_of(NAME, "train"), START), pod_of(NAME, "train", index=1)]
    job = with_status(job, act(job, jobset_of(job), pods=pods, seconds=3600))
    pods[0] = ended(pods[0], WELL, START + timedelta(hours=2), last_report("train", WELL))
    status = status_after(act(job, jobset_of(job), pods=pods, seconds=5 * 3600))
    assert (status["acceleratorHours"], status["earlierAcceleratorHours"]) == ("2.00", "0.00")


# What keeps pods from starting.


def waiting(reason, message=""):
    pod = pod_of(NAME, "prepare")
    state = {"waiting": {"reason": reason, "message": message}}
    return {
        **pod,
        "status": {"phase": "Pending", "containerStatuses": [{"name": "kubegraft", "state": state}]},
    }


def homeless(message, since=0):
    pod = pod_of(NAME, "prepare")
    when = START + timedelta(seconds=since)
    return {
        **pod,
        "status": {
            "phase": "Pending",
            "conditions": [condition("PodScheduled", "False", "Unschedulable", when, message)],
        },
    }


@pytest.mark.parametrize(
    ("pod", "reason", "words"),
    [
        (waiting("ErrImagePull", "manifest unknown"), "ImagePullFailed", "manifest unknown"),
        (waiting("ImagePullBackOff"), "ImagePullFailed", "imagePullSecrets"),
        (
            waiting("CreateContainerConfigError", 'secret "x" not found'),
            "CreateContainerConfigError",
            'secret "x"',
        ),
        (homeless("0/3 nodes are available: 3 Insufficient cpu."), "Unschedulable", "3 Insufficient cpu"),
        (homeless('persistentvolumeclaim "work" not found'), "VolumeNotFound", "Create the claim"),
    ],
)
def test_a_pod_that_can_not_start_is_told_and_does_not_end_the_job(pod, reason, words):
    job = transfer_job()
    actions = act(job, jobset_of(job), pods=[pod])
    assert told(actions)[:2] == ("False", reason)
    assert words in told(actions)[2]
    assert find(status_after(actions)["conditions"], "Failed") == {}
    assert any(event.type == "Warning" and event.reason == reason for event in only(actions, Event))


def test_a_pod_may_wait_for_its_node_for_a_moment():
    job = transfer_job()
    actions = act(job, jobset_of(job), pods=[homeless("0/3 nodes", since=55)])
    assert told(actions)[:2] == ("False", "Starting")
    assert only(actions, Requeue) == [Requeue(10)]


def test_the_same_words_with_other_figures_are_not_written_again():
    job = transfer_job()
    job = with_status(job, act(job, jobset_of(job), pods=[homeless("0/3 nodes: 3 Insufficient cpu.")]))
    assert not only(act(job, jobset_of(job), pods=[homeless("0/9 nodes: 9 Insufficient cpu.")]), PatchStatus)
    other = act(job, jobset_of(job), pods=[homeless("0/9 nodes: 9 taints.")])
    assert "taints" in told(other)[2]


@pytest.mark.parametrize(
    ("event", "pods", "reason"),
    [
        (
            {"reason": "FailedMount", "name": f"{NAME}-prepare-0-0-a0"},
            [pod_of(NAME, "prepare")],
            "VolumeNotMounted",
        ),
        (
            {"reason": "FailedAttachVolume", "name": f"{NAME}-train-0-1-a0"},
            [running(pod_of(NAME, "train"), START), pod_of(NAME, "train", index=1)],
            "VolumeNotMounted",
        ),
        ({"reason": "FailedMount", "name": "another"}, [pod_of(NAME, "prepare")], "Starting"),
        ({"reason": "FailedCreate", "message": "pods is forbidden: exceeded quota"}, [], "Forbidden"),
        (
            {"reason": "FailedCreate", "message": 'error looking up service account: "x" not found'},
            [],
            "ServiceAccountNotFound",
        ),
        ({"reason": "JobCreationFailed", "message": "bad"}, [], "CreationFailed"),
        ({"reason": "FailedCreate", "message": "forbidden"}, [pod_of(NAME, "prepare")], "Starting"),
        (
            {"reason": "FailedCreate", "message": "forbidden"},
            [running(pod_of(NAME, "prepare"), START)],
            "Preparing",
        ),
        ({"reason": "BackOff"}, [], "Starting"),
    ],
)
def test_warnings_about_the_jobs_objects_are_told_while_nothing_runs(event, pods, reason):
    job = transfer_job()
    assert told(act(job, jobset_of(job), pods=pods, events=(event,)))[1] == reason


def test_a_pod_that_can_not_end_names_its_lost_node():
    job = transfer_job()
    pod = running(pod_of(NAME, "train"), START)
    pod["metadata"]["deletionTimestamp"] = timestamp(START)
    pod["status"]["containerStatuses"] = []
    actions = act(job, jobset_of(job, restarts=1), pods=[pod], seconds=90)
    assert told(actions)[:2] == ("False", "NodeLost")
    assert "node-1" in told(actions)[2]
    assert told(act(job, jobset_of(job, restarts=1), pods=[pod], seconds=50))[1] == "Restarting"


# Restarts.


@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        (NODE_LOST, "Restarting"),
        (PEER_LOST, "Restarting"),
        (CRASH, "Crashed"),
        (KILLED, "Killed"),
    ],
)
def test_a_restart_is_told_with_its_cause(fate, reason):
    job = transfer_job()
    job = with_status(job, act(job, jobset_of(job), pods=[running(pod_of(NAME, "train"), START)]))
    actions = act(job, jobset_of(job, restarts=1), pods=[end_pod("train", fate)])
    assert told(actions)[:2] == ("False", reason)
    assert status_after(actions)["restarts"] == 1
    assert "last checkpoint" in told(actions)[2]


def test_a_restart_whose_pods_run_again_already_is_told_by_an_event():
    job = transfer_job()
    job = with_status(job, act(job, jobset_of(job), pods=[running(pod_of(NAME, "train"), START)]))
    again = act(job, jobset_of(job, restarts=2), pods=[running(pod_of(NAME, "train", attempt=2), START)])
    assert told(again)[:2] == ("True", "Training")
    assert [event.reason for event in only(again, Event)] == ["Restarted"]


def test_what_training_can_not_mend_ends_the_job_at_once():
    job = transfer_job()
    actions = act(job, jobset_of(job), pods=[end_pod("train", DIVERGED)])
    assert told(actions, "Failed")[:2] == ("True", "TrainingDiverged")
    (delete,) = only(actions, Delete)
    assert (delete.kind, delete.name, delete.uid, delete.resource_version) == ("JobSet", NAME, "uid-js", "7")
    assert actions.index(only(actions, PatchStatus)[0]) < actions.index(delete)


@pytest.mark.parametrize("role", ["prepare", "train", "finish"])
@pytest.mark.parametrize("restarts", [0, 1])  # 1: seen only when the JobSet has started again already
def test_memory_that_is_too_little_ends_the_job_at_once_in_any_part(role, restarts):
    job = transfer_job()
    pods = [end_pod("train", PEER_LOST), end_pod(role, OUT_OF_MEMORY, index=1)]
    actions = act(job, jobset_of(job, restarts=restarts), pods=pods)
    assert told(actions, "Failed")[:2] == ("True", "OutOfMemory")
    for words in ("limit of 8Gi", "resources.limits.memory", "batch_size"):
        assert words in told(actions, "Failed")[2]
    assert [delete.kind for delete in only(actions, Delete)] == ["JobSet"]


def test_a_pod_that_lost_a_child_for_memory_and_ended_well_is_no_failure():
    job = transfer_job()
    survivor = end_pod("prepare", Fate(killed_by="OOMKilled"))
    assert find(status_after(act(job, jobset_of(job), pods=[survivor]))["conditions"], "Failed") == {}


def stalled_job(seen=10, percent=40, **status):
    job = transfer_job()
    before = {
        "restarts": 10,
        "uncountedRestarts": 10,
        "restartsWithoutProgress": seen,
        "exactProgress": percent,
    }
    job["status"] = {**before, "stage": "fine_tune", "progress": 40, **status}
    return job


def test_one_restart_too_many_without_progress_ends_the_job_with_what_was_seen_last():
    job = stalled_job(lastEnds="train exit code 75: worker 1 did not answer.")
    assert not only(act(job, jobset_of(job, restarts=10)), Delete)
    actions = act(job, jobset_of(job, restarts=11))
    assert told(actions, "Failed")[:2] == ("True", "NoProgress")
    for words in (
        "10 times in a row",
        "40 % (stage fine_tune)",
        "worker 1 did not answer",
        "create the job anew",
    ):
        assert words in told(actions, "Failed")[2]
    assert status_after(actions)["restartsWithoutProgress"] == 11
    assert only(actions, Delete)
    lost = {**pod_of(NAME, "train"), "status": {"phase": "Failed", "reason": "Evicted"}}
    bare = {**pod_of(NAME, "train", index=1), "status": {"phase": "Failed"}}
    pods = [end_pod("train", KILLED, index=2), lost, bare]
    message = told(act(job, jobset_of(job, restarts=11), pods=pods), "Failed")[2]
    assert "train Evicted; train no exit code; train exit code 137: Error." in message
    unseen = stalled_job(stage="")
    assert "nothing is left" in told(act(unseen, jobset_of(unseen, restarts=11)), "Failed")[2]
    assert "not begun" in told(act(unseen, jobset_of(unseen, restarts=11)), "Failed")[2]


@pytest.mark.parametrize(
    ("before", "jobset", "report", "after"),
    [
        ({}, {"restarts": 11}, Report(stage="fine_tune", progress=3), 0),  # 41 %: less than a step of ten
        ({}, {"restarts": 11}, Report(stage="evaluate"), 0),
        ({"stage": "train_head"}, {"restarts": 11}, Report(stage="fine_tune"), 0),
        ({}, {"restarts": 11, "restartsCountTowardsMax": 1}, Report(stage="fine_tune"), 10),
        ({"restartsWithoutProgress": 3}, {"restarts": 14}, Report(stage="ingest", progress=100), 4),
        ({"restartsWithoutProgress": 3}, {"restarts": 2}, Report(stage="odd", progress=99), 3),
    ],
)
def test_only_uncounted_restarts_in_a_row_that_were_seen_without_progress_count(
    before, jobset, report, after
):
    job = stalled_job(**before)
    pod = running(pod_of(NAME, "train", attempt=jobset["restarts"]), START)
    actions = act(job, jobset_of(job, **jobset), pods=[pod], reports={pod["metadata"]["name"]: report})
    assert status_after(actions)["restartsWithoutProgress"] == after
    assert not only(actions, Delete)


def test_restarts_of_a_gang_that_waits_for_a_node_do_not_count():
    job = stalled_job()
    waits = [condition("Running", "False", "Unschedulable", START)]
    job["status"]["conditions"] = waits
    actions = act(job, jobset_of(job, restarts=11))
    assert not only(actions, Delete)
    assert status_after(actions)["restartsWithoutProgress"] == 10


def test_patience_begins_anew_where_a_person_suspends_the_job():
    job = stalled_job()
    job["spec"]["suspend"] = True
    assert status_after(act(job, jobset_of(job, restarts=11)))["restartsWithoutProgress"] == 0


# Suspension, queues and deadlines.


def test_suspending_stops_the_pods_and_resuming_starts_them_again():
    job = transfer_job()
    job = with_status(job, act(job, jobset_of(job)))
    held = {**job, "spec": {**job["spec"], "suspend": True}}
    actions = act(held, jobset_of(job))
    (apply,) = only(actions, Apply)
    assert apply.manifest["spec"]["suspend"] is True
    assert apply.manifest["metadata"]["resourceVersion"] == "7"
    assert not apply.create
    assert told(actions)[:2] == ("False", "Suspended")
    assert "startTime" not in status_after(actions)
    assert not only(act(with_status(held, actions), jobset_of(job, suspend=True)), Apply)
    (resumed,) = only(act(job, jobset_of(job, suspend=True)), Apply)
    assert resumed.manifest["spec"]["suspend"] is False


def test_after_a_resumption_the_start_is_that_of_the_resumption():
    job = transfer_job()
    at = START + timedelta(seconds=40)
    resumed = jobset_of(job, [condition("Suspended", "False", "ResumeJobs", at)])
    assert status_after(act(job, resumed))["startTime"] == timestamp(at)


def test_a_job_that_waited_longer_than_its_deadline_starts_when_it_is_let_go():
    job = transfer_job(queueName="team-queue", activeDeadlineSeconds=100)
    # Kueue has let it go, and JobSet's status still says what it did at its creation.
    let_go = jobset_of(job, [condition("Suspended", "True", "SuspendedJobs", START)], suspend=False)
    actions = act(job, let_go, seconds=5000)
    assert not only(actions, Delete)
    assert status_after(actions)["startTime"] == timestamp(START + timedelta(seconds=5000))


def test_a_queue_that_kueue_gave_a_job_without_one_is_kueues_business():
    job = transfer_job()
    jobset = jobset_of(job, suspend=True)
    jobset["metadata"]["labels"] = {**jobset["metadata"].get("labels", {}), QUEUE_LABEL: "default"}
    actions = act(job, jobset)
    assert not only(actions, Apply) + only(actions, Delete)
    assert told(actions, "Admitted")[:2] == ("False", "Queued")
    held = act(transfer_job(suspend=True), jobset)
    assert [delete.kind for delete in only(held, Delete)] == ["JobSet"]


def test_what_is_left_of_a_former_job_of_the_same_name_says_nothing_about_this_one():
    job = transfer_job()
    former = end_pod("train", OUT_OF_MEMORY)
    former["metadata"]["name"] = "signs-0123456789-train-0-0-abcde"
    actions = act(job, jobset_of(job), pods=[former])
    assert not only(actions, Delete)
    assert told(actions)[:2] == ("False", "Starting")


def test_with_a_queue_the_jobset_is_made_suspended_and_only_kueue_lets_it_go():
    job = transfer_job(queueName="team-queue", priorityClass="high")
    made = only(act(job), Apply)[1].manifest
    assert made["spec"]["suspend"] is True
    assert made["metadata"]["labels"][QUEUE_LABEL] == "team-queue"
    waits = act(job, jobset_of(job))
    assert told(waits, "Admitted")[:2] == ("False", "Queued")
    assert not only(waits, Apply)
    job = with_status(job, waits)
    assert told(act(job, jobset_of(job, suspend=False)), "Admitted")[:2] == ("True", "AdmittedByQueue")
    assert told(act(job, jobset_of(job, suspend=False)))[:2] == ("False", "Starting")


def test_suspending_a_queued_job_gives_back_its_quota():
    job = transfer_job(queueName="team-queue", suspend=True)
    actions = act(job, jobset_of(job, suspend=False))
    assert [delete.kind for delete in only(actions, Delete)] == ["JobSet"]
    assert told(actions, "Admitted")[:2] == ("False", "Suspended")


def test_restarts_are_those_of_all_jobsets_that_a_queue_has_had_made():
    job = transfer_job(queueName="team-queue")
    first = with_status(job, act(job, jobset_of(job, restarts=3, restartsCountTowardsMax=1)))
    held = {**first, "spec": {**first["spec"], "suspend": True}}
    held = with_status(held, act(held))
    assert held["status"]["restarts"] == 3

    def anew(restarts):
        jobset = jobset_of(job, suspend=False, restarts=restarts, restartsCountTowardsMax=0)
        jobset["metadata"]["uid"] = "uid-second"
        return jobset

    again = {**first, "status": held["status"]}
    again = with_status(again, act(again, anew(0)))
    assert again["status"]["restarts"] == 3
    status = status_after(act(again, anew(1)))
    assert (status["restarts"], status["uncountedRestarts"]) == (4, 3)
    assert told(act(again, anew(1)))[1] == "Restarting"


def test_another_queue_means_another_jobset():
    job = transfer_job(queueName="team-queue")
    before = jobset_of(transfer_job())
    assert [delete.kind for delete in only(act(job, before), Delete)] == ["JobSet"]
    held = transfer_job(queueName="team-queue", suspend=True)
    assert [delete.kind for delete in only(act(held, before), Delete)] == ["JobSet"]


def test_the_deadline_ends_the_job_and_is_looked_at_in_time():
    job = transfer_job(activeDeadlineSeconds=100)
    early = act(job, jobset_of(job), seconds=60)
    assert only(early, Requeue) == [Requeue(40.0)]
    late = act(with_status(job, early), jobset_of(job), seconds=100)
    assert told(late, "Failed")[:2] == ("True", "DeadlineExceeded")
    assert only(late, Delete)
    waits = jobset_of(job, suspend=True)
    assert not only(act(job, waits, seconds=10_000), Delete)


def test_somebody_elses_jobset_of_the_same_name_is_told_and_left_alone():
    job = transfer_job()
    foreign = jobset_of(job)
    foreign["metadata"]["ownerReferences"] = []
    actions = act(job, foreign)
    for kind in ("Admitted", "Running"):
        assert told(actions, kind)[:2] == ("False", "NameConflict")
    assert not only(actions, Apply) + only(actions, Delete)


def test_a_jobset_that_is_going_is_waited_for():
    job = transfer_job()
    going = jobset_of(job)
    going["metadata"]["deletionTimestamp"] = timestamp(START)
    assert act(job, going) == (Requeue(2.0),)


# The end.


def completed(job, at=30):
    when = START + timedelta(seconds=at)
    return jobset_of(job, [condition("Completed", "True", "AllJobsCompleted", when)])


def test_success_is_told_with_metrics_and_model():
    job = transfer_job(nodes=2)
    pods = [
        end_pod("prepare", WELL),
        end_pod("train", WELL),
        end_pod("train", WELL, index=1),
        end_pod("finish", WELL),
    ]
    actions = act(job, completed(job), pods=pods)
    status = status_after(actions)
    assert told(actions, "Succeeded") == ("True", "Exported", "The model is exported to gs://models/signs.")
    assert told(actions)[:2] == ("False", "Succeeded")
    assert (status["stage"], status["progress"]) == ("export", 100)
    assert status["metrics"]["testAccuracy"] == "0.9700"
    assert status["modelUri"] == "gs://models/signs"
    assert status["completionTime"] == timestamp(START + timedelta(seconds=30))
    assert [event.reason for event in only(actions, Event)] == ["Started", "Exported"]
    assert act(with_status(job, actions), completed(job), pods=pods) == ()


def test_the_last_report_is_waited_for_but_not_for_long():
    job = transfer_job()
    pods = [end_pod("prepare", WELL), end_pod("train", WELL)]
    assert act(job, completed(job), pods=pods, seconds=40) == (Requeue(2.0),)
    actions = act(job, completed(job), pods=pods, seconds=45)
    assert "metrics are missing" in told(actions, "Succeeded")[2]


def test_an_export_to_the_volume_has_no_uri():
    job = transfer_job()
    finish = end_pod("finish", WELL)
    terminated = finish["status"]["containerStatuses"][0]["state"]["terminated"]
    terminated["message"] = Report(stage="export", done=True).to_json()
    pods = [end_pod("prepare", WELL), end_pod("train", WELL), finish]
    assert told(act(job, completed(job), pods=pods), "Succeeded")[2] == "The model is exported to the volume."


EVICTED = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
FULL_POD = {
    "phase": "Failed",
    "reason": "Evicted",
    "message": "Pod ephemeral local storage usage exceeds 8Gi.",
}


@pytest.mark.parametrize(
    ("pod", "jobset_reason", "reason", "words"),
    [
        (end_pod("prepare", BAD_CONFIG), "FailJobSetFailurePolicyAction", "ConfigRejected", "must be known"),
        (end_pod("prepare", BAD_DATA), "FailJobSetFailurePolicyAction", "DataRejected", "has no images"),
        (
            end_pod("prepare", Fate(exit_code=4)),
            "FailJobSetFailurePolicyAction",
            "ModelRejected",
            "exit code 4",
        ),
        (end_pod("prepare", CRASH), "ReachedMaxRestarts", "TooManyRestarts", "2 times (maxRestarts)"),
        (end_pod("prepare", KILLED), "ReachedMaxRestarts", "TooManyRestarts", "SIGKILL"),
        (end_pod("prepare", OUT_OF_MEMORY), "ReachedMaxRestarts", "OutOfMemory", "limit of 8Gi"),
        (end_pod("prepare", FULL_DISK), "ReachedMaxRestarts", "DiskFull", "Enlarge the volume"),
        ({**pod_of(NAME, "prepare"), "status": EVICTED}, "ReachedMaxRestarts", "Evicted", "low on resource"),
        ({**pod_of(NAME, "prepare"), "status": FULL_POD}, "ReachedMaxRestarts", "DiskFull", "ephemeral"),
        (
            {**pod_of(NAME, "prepare"), "status": {"phase": "Failed"}},
            "ReachedMaxRestarts",
            "TooManyRestarts",
            "None",
        ),
    ],
)
def test_a_failure_has_a_reason_and_says_how_to_fix_it(pod, jobset_reason, reason, words):
    job = transfer_job()
    jobset = failed_jobset(job, "prepare", jobset_reason)
    actions = act(job, jobset, pods=[pod])
    assert told(actions, "Failed")[:2] == ("True", reason)
    assert words in told(actions, "Failed")[2]
    assert told(actions) == ("False", *told(actions, "Failed")[1:])
    assert not only(actions, Delete)
    assert [event.type for event in only(actions, Event)] == ["Normal", "Warning"]


def test_memory_without_a_limit_is_told_without_one():
    pod = end_pod("prepare", OUT_OF_MEMORY)
    pod = {**pod, "spec": {"containers": [{"name": "kubegraft", "image": "image:1"}]}}
    job = transfer_job()
    assert (
        "than its node had, without a limit"
        in told(act(job, failed_jobset(job, "prepare"), pods=[pod]), "Failed")[2]
    )


def test_the_pod_that_broke_the_gang_explains_the_failure_and_not_its_victims():
    job = transfer_job(nodes=3)
    pods = [
        end_pod("train", PEER_LOST),
        end_pod("train", CRASH, index=1),
        end_pod("train", OUT_OF_MEMORY, index=2),
        end_pod("prepare", BAD_DATA, attempt=1),
    ]
    assert told(act(job, failed_jobset(job), pods=pods), "Failed")[1] == "OutOfMemory"


def test_a_failure_is_explained_only_when_its_pod_is_seen_or_after_a_while():
    job = transfer_job()
    for pods in ([], [end_pod("train", PEER_LOST)], [end_pod("prepare", CRASH)]):
        assert act(job, failed_jobset(job), pods=pods, seconds=40) == (Requeue(2.0),)
    late = act(job, failed_jobset(job), seconds=50)
    assert told(late, "Failed")[:2] == ("True", "JobSetFailed")
    late = act(job, failed_jobset(job), pods=[end_pod("train", PEER_LOST)], seconds=50)
    assert told(late, "Failed")[:2] == ("True", "Interrupted")


def test_a_jobset_that_names_no_job_is_explained_by_any_pod():
    job = transfer_job()
    failed = jobset_of(job, [{"type": "Failed", "status": "True"}])
    actions = act(job, failed, pods=[end_pod("finish", CRASH)])
    assert told(actions, "Failed")[:2] == ("True", "Crashed")


# After the end.


def at_the_end(**spec):
    job = transfer_job(**spec)
    return with_status(job, act(job, failed_jobset(job, "prepare"), pods=[end_pod("prepare", CRASH)]))


def test_after_the_end_nothing_is_made_again():
    assert act(at_the_end()) == ()


def test_a_jobset_that_goes_on_after_the_end_is_deleted():
    job = at_the_end()
    (delete,) = act(job, jobset_of(job))
    assert delete.kind == "JobSet"
    foreign = jobset_of(job)
    foreign["metadata"]["ownerReferences"] = []
    assert act(job, foreign) == ()


def test_a_finished_job_goes_when_its_time_to_live_is_over():
    job = at_the_end(ttlSecondsAfterFinished=100)
    assert act(job, seconds=60) == (Requeue(70.0),)
    (delete,) = act(job, seconds=130)
    assert (delete.kind, delete.name, delete.uid) == ("TransferJob", "signs", "uid-signs")
    unfinished = transfer_job(ttlSecondsAfterFinished=0)
    actions = act(unfinished, failed_jobset(unfinished, "prepare"), pods=[end_pod("prepare", CRASH)])
    assert not only(actions, Delete)
    assert only(actions, Requeue) == [Requeue(1.0)]


def test_a_change_after_the_end_is_acknowledged():
    job = at_the_end()
    job["metadata"]["generation"] = 4
    assert status_after(act(job))["observedGeneration"] == 4


def test_conditions_that_others_wrote_stay():
    job = transfer_job()
    blessed = condition("Blessed", "True", "BetterThanChampion", START)
    job["status"] = {"conditions": [blessed]}
    assert blessed in status_after(act(job, jobset_of(job)))["conditions"]


def test_pods_that_are_no_part_of_the_job_are_left_out():
    job = transfer_job()
    stray = running(pod_of(NAME, "other"), START)
    odd = running(pod_of(NAME, "train"), START)
    odd["metadata"]["labels"]["jobset.sigs.k8s.io/restart-attempt"] = "odd"
    assert told(act(job, jobset_of(job), pods=[stray]))[1] == "Starting"
    assert told(act(job, jobset_of(job), pods=[odd]))[1] == "Training"
