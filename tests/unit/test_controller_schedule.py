"""When a TransferSchedule makes a job, when not, and what it says about it."""

import itertools
import random
from datetime import UTC, datetime, timedelta

import jsonschema
import pytest

from kubegraft.controller.actions import Apply, Delete, Event, PatchStatus, Requeue
from kubegraft.controller.conditions import find, timestamp
from kubegraft.controller.crd import transfer_schedule
from kubegraft.controller.observed import SCHEDULE_LABEL, ObservedSchedule
from kubegraft.controller.schedule import TICK_ANNOTATION, reconcile_schedule
from kubegraft.controller.ticks import parse_cron
from kubegraft.errors import ConfigError
from kubegraft.job_report import Report
from tests.controller_world import SETTINGS, condition

MIDNIGHT = datetime(2026, 3, 2, tzinfo=UTC)
TICK = MIDNIGHT + timedelta(hours=3)
STATUS_SCHEMA = transfer_schedule()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][
    "status"
]


def schedule_of(status=None, **spec):
    return {
        "metadata": {
            "name": "nightly",
            "namespace": "team",
            "uid": "uid-ts",
            "generation": 1,
            "creationTimestamp": timestamp(MIDNIGHT),
        },
        "spec": {"cron": "0 3 * * *", "template": {"spec": {"nodes": 2}}, **spec},
        "status": status or {},
    }


def name_at(tick):
    return f"nightly-{int(tick.timestamp()) // 60}"


def made(tick, *, outcome="", digest="", kind="job", **metadata):
    """Return a job (or look) that a tick made; it has not ended without an outcome."""
    conditions = [condition(outcome, "True", "Because", tick)] if outcome else []
    return {
        "metadata": {
            "name": name_at(tick) + ("-look" if kind == "look" else ""),
            "namespace": "team",
            "uid": f"uid-{name_at(tick)}",
            "annotations": {TICK_ANNOTATION: timestamp(tick)},
            "ownerReferences": [{"uid": "uid-ts"}],
            **metadata,
        },
        "status": {"conditions": conditions, **({"datasetDigest": digest} if digest else {})},
    }


def look_pod(tick, report, exit_code=0):
    terminated = {"exitCode": exit_code, "message": report.to_json() if report else "?"}
    return {
        "metadata": {"name": "pod", "labels": {"batch.kubernetes.io/job-name": f"{name_at(tick)}-look"}},
        "status": {"containerStatuses": [{"name": "kubegraft", "state": {"terminated": terminated}}]},
    }


def act(schedule, *, at=TICK, **more):
    return reconcile_schedule(ObservedSchedule(schedule=schedule, now=at, **more), SETTINGS)


def only(actions, kind):
    return [each for each in actions if isinstance(each, kind)]


def status_after(actions):
    (patch,) = only(actions, PatchStatus)
    jsonschema.Draft4Validator(STATUS_SCHEMA).validate(patch.status)
    return patch.status


def decision(actions):
    found = status_after(actions)["lastDecision"]
    return found["ran"], found["reason"]


def jobs_made(actions):
    return [
        each.manifest["metadata"]["name"]
        for each in only(actions, Apply)
        if each.manifest["kind"] == "TransferJob"
    ]


# By the clock.


def test_before_its_tick_a_schedule_only_says_when():
    actions = act(schedule_of(), at=MIDNIGHT)
    status = status_after(actions)
    assert status["nextScheduleTime"] == timestamp(TICK)
    assert find(status["conditions"], "Ready")["status"] == "True"
    assert not only(actions, Apply)
    assert only(actions, Requeue) == [Requeue(3600.0)]
    assert act(schedule_of(status), at=TICK - timedelta(seconds=5)) == (Requeue(5.0),)


def test_a_tick_makes_a_job_and_tells_so():
    template = {
        "metadata": {"labels": {"team": "vision"}, "annotations": {"note": "x"}},
        "spec": {"nodes": 2},
    }
    actions = act(schedule_of(template=template), at=TICK + timedelta(seconds=4))
    (apply,) = only(actions, Apply)
    metadata = apply.manifest["metadata"]
    assert apply.create
    assert metadata["name"] == name_at(TICK)
    assert metadata["labels"] == {"team": "vision", SCHEDULE_LABEL: "nightly"}
    assert metadata["annotations"] == {"note": "x", TICK_ANNOTATION: timestamp(TICK)}
    assert metadata["ownerReferences"][0]["uid"] == "uid-ts"
    assert apply.manifest["spec"] == {"nodes": 2}
    status = status_after(actions)
    assert (status["lastScheduleTime"], status["lastRunTime"]) == (timestamp(TICK), timestamp(TICK))
    assert decision(actions) == (True, "Scheduled")
    assert status["lastDecision"]["jobName"] == name_at(TICK)
    assert status["nextScheduleTime"] == timestamp(TICK + timedelta(days=1))


def test_a_decision_that_a_crash_cut_short_is_told_and_not_taken_again():
    actions = act(schedule_of(concurrencyPolicy="Forbid"), jobs=(made(TICK),))
    assert not only(actions, Apply)
    assert decision(actions) == (True, "Scheduled")
    assert status_after(actions)["active"] == [name_at(TICK)]


def test_of_several_missed_ticks_the_last_counts():
    actions = act(schedule_of(), at=TICK + timedelta(days=4, minutes=1))
    assert jobs_made(actions) == [name_at(TICK + timedelta(days=4))]


def test_a_tick_that_is_served_too_late_is_skipped():
    late = TICK + timedelta(seconds=61)
    actions = act(schedule_of(startingDeadlineSeconds=60), at=late)
    assert decision(actions) == (False, "MissedDeadline")
    assert not only(actions, Apply)
    assert "lastRunTime" not in status_after(actions)
    assert decision(act(schedule_of(startingDeadlineSeconds=60), at=TICK)) == (True, "Scheduled")


def test_a_suspended_schedule_makes_nothing():
    actions = act(schedule_of({"nextScheduleTime": "x"}, suspend=True))
    assert find(status_after(actions)["conditions"], "Ready")["reason"] == "Suspended"
    assert "nextScheduleTime" not in status_after(actions)
    assert not only(actions, Apply)


def test_a_schedule_that_is_going_is_left_alone():
    schedule = schedule_of()
    schedule["metadata"]["deletionTimestamp"] = timestamp(TICK)
    assert act(schedule) == ()


@pytest.mark.parametrize(
    "spec",
    [
        {"cron": "0 25 * * *"},
        {"timeZone": "Europe/Berlim"},
        {"timeZone": "/etc/passwd"},
        {"template": {"spec": {"head": {"learning_rate": 7}}}, "onDataChange": {}},
    ],
)
def test_what_can_not_work_is_told(spec):
    actions = act(schedule_of(**spec))
    ready = find(status_after(actions)["conditions"], "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "Invalid")
    assert "must be" in ready["message"] or "must have" in ready["message"]
    assert not only(actions, Apply)


# Beside other jobs.

YESTERDAY = TICK - timedelta(days=1)


@pytest.mark.parametrize(
    ("policy", "ran", "deleted"),
    [("Forbid", False, []), ("Allow", True, []), ("Replace", True, ["TransferJob"])],
)
def test_a_tick_while_a_job_runs(policy, ran, deleted):
    schedule = schedule_of(concurrencyPolicy=policy)
    actions = act(schedule, jobs=(made(YESTERDAY),))
    assert decision(actions)[0] is ran
    assert [each.kind for each in only(actions, Delete)] == deleted
    ended = act(schedule, jobs=(made(YESTERDAY, outcome="Failed"),))
    assert decision(ended)[0] is True


def test_jobs_of_another_schedule_of_the_same_name_do_not_count():
    stray = made(YESTERDAY, ownerReferences=[{"uid": "uid-older"}])
    assert decision(act(schedule_of(), jobs=(stray,)))[0] is True


def test_old_jobs_go_by_the_limits_of_the_history():
    days = [TICK - timedelta(days=day) for day in range(1, 7)]
    jobs = [made(day, outcome="Succeeded" if index % 2 else "Failed") for index, day in enumerate(days)]
    jobs.append(made(days[-1] - timedelta(days=1)))
    status = {"lastScheduleTime": timestamp(days[0])}
    schedule = schedule_of(status, successfulJobsHistoryLimit=1, failedJobsHistoryLimit=2)
    deleted = only(act(schedule, at=TICK - timedelta(hours=1), jobs=tuple(jobs)), Delete)
    assert {each.name for each in deleted} == {name_at(days[3]), name_at(days[5]), name_at(days[4])}
    assert all(each.uid for each in deleted)
    going = {**jobs[5], "metadata": {**jobs[5]["metadata"], "deletionTimestamp": "x"}}
    deleted = only(act(schedule, at=TICK - timedelta(hours=1), jobs=(*jobs[:5], going)), Delete)
    assert name_at(days[5]) not in {each.name for each in deleted}


# Where the data must have changed.


def on_change(least=0.0, **status):
    return schedule_of(status, onDataChange={"minimumChangedFraction": least})


def looked(outcome="Complete"):
    return made(TICK, outcome=outcome, kind="look")


def test_a_tick_first_looks_at_the_data():
    actions = act(on_change(lastDatasetDigest="d1"))
    config_map, look = [each.manifest for each in only(actions, Apply)]
    assert (config_map["kind"], look["kind"]) == ("ConfigMap", "Job")
    assert len(look["metadata"]["name"]) <= 63
    container = look["spec"]["template"]["spec"]["containers"][0]
    assert container["command"][-2:] == ["--known", "d1"]
    assert "args" not in container
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert "lastDecision" not in status_after(actions)
    again = act(on_change(lastDatasetDigest="d1"), looks=(made(TICK, kind="look"),))
    assert not only(again, Apply)
    assert only(again, Requeue) == [Requeue(30.0)]


@pytest.mark.parametrize(
    ("least", "known", "found", "fraction", "ran", "reason"),
    [
        (0, "", "d1", None, True, "FirstRun"),
        (0, "d1", "d1", 0.0, False, "DataUnchanged"),
        (0, "d1", "d2", 0.001, True, "DataChanged"),
        (0.1, "d1", "d2", 0.05, False, "ChangeTooSmall"),
        (0.1, "d1", "d2", 0.1, True, "DataChanged"),
        (0.1, "d1", "d2", None, True, "DataChanged"),
    ],
)
def test_what_the_look_saw_decides(least, known, found, fraction, ran, reason):
    metrics = {} if fraction is None else {"changed_fraction": fraction}
    report = Report(stage="ingest", done=True, dataset_digest=found, metrics=metrics)
    schedule = on_change(least, **({"lastDatasetDigest": known} if known else {}))
    actions = act(schedule, looks=(looked(),), pods=(look_pod(TICK, report),))
    assert decision(actions) == (ran, reason)
    assert bool(jobs_made(actions)) is ran


def test_the_data_of_the_last_successful_run_is_what_is_compared_with():
    jobs = (
        made(TICK - timedelta(days=3), outcome="Succeeded", digest="d1"),
        made(TICK - timedelta(days=2), outcome="Succeeded", digest="d2"),
        made(TICK - timedelta(days=1), outcome="Failed", digest="d3"),
    )
    actions = act(on_change(lastDatasetDigest="d0"), jobs=jobs)
    assert (
        only(actions, Apply)[1].manifest["spec"]["template"]["spec"]["containers"][0]["command"][-1] == "d2"
    )
    assert status_after(actions)["lastDatasetDigest"] == "d2"


def test_a_look_that_failed_lets_the_job_say_why():
    report = Report(error="StorageError", message="`source` could not be read.", exit_code=8)
    other = look_pod(TICK - timedelta(days=1), report)
    actions = act(on_change(), looks=(looked("Failed"),), pods=(other, look_pod(TICK, report, 8)))
    assert decision(actions) == (True, "LookFailed")
    assert "could not be read" in status_after(actions)["lastDecision"]["message"]
    assert decision(act(on_change(), looks=(looked("Failed"),))) == (True, "LookFailed")


def test_the_report_of_a_look_is_waited_for_but_not_for_long():
    waits = act(on_change(), looks=(looked(),), pods=(look_pod(TICK, None),), at=TICK + timedelta(seconds=5))
    assert "lastDecision" not in status_after(waits)
    actions = act(on_change(), looks=(looked(),), at=TICK + timedelta(seconds=20))
    assert decision(actions) == (True, "LookFailed")
    silent = look_pod(TICK, None)
    silent["status"]["containerStatuses"][0]["name"] = "sidecar"
    assert decision(act(on_change(), looks=(looked(),), pods=(silent,), at=TICK + timedelta(seconds=20)))[0]


def test_a_look_that_takes_longer_than_it_is_to_the_next_ticks_is_decided_first():
    """Else looks would pile up, each too late for its own tick."""
    later = TICK + timedelta(days=2, hours=1)
    goes_on = act(on_change(), looks=(made(TICK, kind="look"),), at=later)
    assert not only(goes_on, Apply)
    report = Report(stage="ingest", done=True, dataset_digest="d1")
    actions = act(on_change(), looks=(looked(),), pods=(look_pod(TICK, report),), at=later)
    assert decision(actions) == (True, "FirstRun")
    assert jobs_made(actions) == [name_at(TICK)]
    schedule = on_change(lastScheduleTime=timestamp(TICK))
    following = act(schedule, looks=(looked(),), at=later)
    assert (
        only(following, Apply)[1].manifest["metadata"]["name"] == f"{name_at(TICK + timedelta(days=2))}-look"
    )


@pytest.mark.parametrize("changes", [{}, {"onDataChange": {}}])
def test_what_the_api_server_refuses_to_make_is_told_and_tried_again(changes):
    refusal = 'transferjobs "x" is forbidden: exceeded quota'
    actions = act(schedule_of(**changes), refusal=refusal)
    words = list(itertools.takewhile(lambda one: not isinstance(one, Apply), actions))
    (patch,) = only(words, PatchStatus)
    (condition,) = patch.status["conditions"]
    assert (condition["type"], condition["status"], condition["reason"]) == ("Ready", "False", "Forbidden")
    assert "exceeded quota" in condition["message"]
    assert [event.type for event in only(words, Event)] == ["Warning"]
    again = act(schedule_of(patch.status, **changes), refusal=refusal)
    assert isinstance(again[0], Apply), "it was told already"
    assert only(again, PatchStatus)[-1].status["conditions"][0]["status"] == "True"
    idle = act(schedule_of(**changes), refusal=refusal, at=MIDNIGHT)
    assert status_after(idle)["conditions"][0]["status"] == "True"


def test_a_look_that_can_not_start_is_told():
    waiting = {"reason": "ErrImagePull", "message": "no such image"}
    pod = look_pod(TICK, None)
    pod["status"] = {
        "phase": "Pending",
        "containerStatuses": [{"name": "kubegraft", "state": {"waiting": waiting}}],
    }
    actions = act(on_change(), looks=(made(TICK, kind="look"),), pods=(pod,))
    ready = find(status_after(actions)["conditions"], "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "ImagePullFailed")
    assert "no such image" in ready["message"]
    assert only(actions, Requeue) == [Requeue(30.0)]
    goes_on = act(schedule_of(status_after(actions), onDataChange={}), looks=(made(TICK, kind="look"),))
    assert find(status_after(goes_on)["conditions"], "Ready")["status"] == "True"


def test_a_look_whose_tick_is_decided_goes():
    schedule = on_change(lastScheduleTime=timestamp(TICK))
    deleted = only(act(schedule, looks=(looked(),)), Delete)
    assert [(each.kind, each.name) for each in deleted] == [
        ("Job", f"{name_at(TICK)}-look"),
        ("ConfigMap", f"{name_at(TICK)}-look"),
    ]


def test_a_look_is_not_begun_while_a_job_runs_and_no_deadline_ends_it():
    assert decision(act(on_change(), jobs=(made(YESTERDAY),))) == (False, "StillRunning")
    schedule = on_change()
    schedule["spec"]["startingDeadlineSeconds"] = 60
    late = TICK + timedelta(seconds=600)
    assert "lastDecision" not in status_after(act(schedule, looks=(made(TICK, kind="look"),), at=late))


def test_each_tick_is_decided_once_whatever_the_operator_misses():
    """Random looks at the schedule, crashes after any action, writes that conflict: one job a day, and no other."""
    for seed in range(200):
        rng = random.Random(seed)
        schedule, jobs, now = schedule_of(concurrencyPolicy="Allow"), {}, MIDNIGHT
        old = schedule
        while now < MIDNIGHT + timedelta(days=4):
            now += timedelta(minutes=rng.choice((1, 30, 200)))
            read = rng.choice((schedule, old))
            actions = act(read, at=now, jobs=tuple(jobs.values()))
            for action in actions[: rng.choice((None, 0, 1, 2))]:
                if isinstance(action, Apply):
                    name = action.manifest["metadata"]["name"]
                    jobs.setdefault(name, {**action.manifest, "status": {}})
                elif isinstance(action, PatchStatus):
                    if read is not schedule:
                        break
                    old, schedule = schedule, {**schedule, "status": action.status}
        days = {made["metadata"]["annotations"][TICK_ANNOTATION] for made in jobs.values()}
        assert len(days) == len(jobs) <= 5
        assert all(day.endswith("T03:00:00Z") for day in days)


# Ticks.


def ticks(cron, zone, start, count):
    found, at = [], start
    when = parse_cron(cron, zone)
    for _ in range(count):
        at = when.following(at)
        found.append(at)
    return found


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("*/20 9-10 * * *", ["02T09:00", "02T09:20", "02T09:40", "02T10:00"]),
        ("5/25 9 * * MON-TUE", ["02T09:05", "02T09:30", "02T09:55", "03T09:05"]),
        ("0 0 13 * FRI", ["06T00:00", "13T00:00", "20T00:00", "27T00:00"]),
        ("30 6 1,15 * ?", ["15T06:30"]),
        ("0 12 * mar sun", ["08T12:00", "15T12:00", "22T12:00", "29T12:00"]),
    ],
)
def test_ticks_are_those_of_cron(cron, expected):
    found = ticks(cron, "Etc/UTC", MIDNIGHT, len(expected))
    assert [tick.strftime("%dT%H:%M") for tick in found] == expected
    when = parse_cron(cron, "Etc/UTC")
    assert when.latest(MIDNIGHT, found[-1] + timedelta(seconds=30)) == found[-1]
    assert when.latest(found[-1], found[-1] + timedelta(seconds=30)) is None


def test_a_skipped_hour_has_no_tick_and_a_repeated_one_has_one():
    spring, autumn = datetime(2026, 3, 28, 12, tzinfo=UTC), datetime(2026, 10, 24, 12, tzinfo=UTC)
    assert ticks("30 2 * * *", "Europe/Berlin", spring, 1)[0] == datetime(2026, 3, 30, 0, 30, tzinfo=UTC)
    once = ticks("30 2 * * *", "Europe/Berlin", autumn, 2)
    assert once == [datetime(2026, 10, 25, 0, 30, tzinfo=UTC), datetime(2026, 10, 26, 1, 30, tzinfo=UTC)]
    hourly = ticks("0 * * * *", "Europe/Berlin", autumn, 24)
    assert {later - earlier for earlier, later in itertools.pairwise(hourly)} == {timedelta(hours=1)}


def test_a_day_that_never_comes_has_no_tick():
    never = parse_cron("0 0 31 2 *", "Etc/UTC")
    assert never.following(MIDNIGHT) is None
    assert never.latest(MIDNIGHT - timedelta(days=9000), MIDNIGHT) is None
    assert ticks("0 0 29 2 *", "Etc/UTC", MIDNIGHT, 1)[0].year == 2028
    actions = act(schedule_of(cron="0 0 31 2 *"))
    assert only(actions, Requeue) == [Requeue(3600.0)]


@pytest.mark.parametrize("cron", ["0 0 3 * * *", "@daily", "60 0 * * *"])
def test_another_form_of_cron_is_refused(cron):
    with pytest.raises(ConfigError, match="`cron` must"):
        parse_cron(cron, "Etc/UTC")
