"""A TransferSchedule makes a job at its tick, and says why, or why not."""

import time

from tests.e2e.kube import until


def schedule(jobs, name, **spec) -> dict:
    template = {"spec": jobs.of_standin("x", seconds=0.2)["spec"]}
    return {
        "apiVersion": "kubegraft.dev/v1alpha1",
        "kind": "TransferSchedule",
        "metadata": {"name": name},
        "spec": {"cron": "* * * * *", "timeZone": "Europe/Berlin", "template": template, **spec},
    }


def test_a_tick_makes_a_job_and_another_none_while_the_data_is_unchanged(jobs):
    jobs.cluster.kubectl("delete", "ts", "--all", "--timeout=60s")
    every_tick = schedule(jobs, "ticks", successfulJobsHistoryLimit=1)
    on_change = schedule(jobs, "changes", onDataChange={"minimumChangedFraction": 0.5})
    held = schedule(jobs, "held", suspend=True)
    jobs.cluster.apply(every_tick, on_change, held)
    try:
        began = time.monotonic()

        def decided(name, reason):
            status = jobs.cluster.get("ts", name).get("status", {})
            return status if status.get("lastDecision", {}).get("reason") == reason else None

        status = until(lambda: decided("ticks", "Scheduled"), seconds=90)
        assert status["lastDecision"]["ran"] is True
        job = jobs.get(status["lastDecision"]["jobName"])
        assert job["metadata"]["ownerReferences"][0]["name"] == "ticks"
        jobs.wait(job["metadata"]["name"])
        first = until(lambda: decided("changes", "FirstRun"), seconds=90)
        jobs.wait(first["lastDecision"]["jobName"])
        unchanged = until(lambda: decided("changes", "DataUnchanged"), seconds=90)
        assert unchanged["lastDecision"]["ran"] is False
        assert "d" * 16 in unchanged["lastDecision"]["message"]
        made = [j for j in jobs.cluster.get("tj")["items"] if j["metadata"]["name"].startswith("changes-")]
        assert len(made) == 1
        assert "lastDecision" not in jobs.cluster.get("ts", "held").get("status", {})
        assert time.monotonic() - began < 240
    finally:
        jobs.cluster.kubectl("delete", "ts", "ticks", "changes", "held", "--timeout=60s")
    until(
        lambda: not [j for j in jobs.cluster.get("tj")["items"] if "ticks-" in j["metadata"]["name"]],
        seconds=60,
    )
