"""A CronJob on a bucket trains once for unchanged photographs, and again when there is another."""

import json

import pytest

from tests.e2e.conftest import ACCESS_KEY, BUCKET, SECRET_KEY, in_store, named
from tests.e2e.kube import until

SOURCE, TARGET = f"s3://{BUCKET}/few", f"s3://{BUCKET}/retrained"
UPLOAD = (
    "import boto3, pathlib; root = pathlib.Path('/workspace/data/few'); client = boto3.client('s3'); "
    "[client.upload_file(str(path), {bucket!r}, 'few/' + path.relative_to(root).as_posix()) "
    "for path in root.rglob('*.*')]"
)
ONE_MORE = (
    "import boto3, pathlib; path = sorted(pathlib.Path('/workspace/data/signs/train/0').iterdir())[-1]; "
    "boto3.client('s3').upload_file(str(path), {bucket!r}, 'few/train/0/one_more.jpg')"
)


def finished_ticks(cluster):
    """Return the finished jobs of the CronJob, oldest first, each as the events of its pod."""
    jobs = cluster.get("jobs", **{"app.kubernetes.io/instance": "nightly"})["items"]
    ended = [
        job
        for job in sorted(jobs, key=lambda job: job["metadata"]["creationTimestamp"])
        if any(
            c["type"] in ("Complete", "Failed") and c["status"] == "True"
            for c in job["status"].get("conditions", [])
        )
    ]
    for job in ended:
        assert job["status"].get("succeeded") == 1, cluster.story(job["metadata"]["name"])
    return [(job, list(cluster.events_of(f"job/{job['metadata']['name']}"))) for job in ended]


def told(events, event):
    return [one for one in events if one["event"] == event]


@pytest.fixture(scope="module")
def nightly(cluster, stores, rendered):
    """A CronJob that ticks every minute, without a volume: images and results are in the bucket."""
    in_store(cluster, "s3", UPLOAD.format(bucket=BUCKET))
    objects = rendered(
        "cronjob", SOURCE, "--name", "nightly", "--cron", "* * * * *", "--publish", TARGET, "--claim", "",
        "--secret", stores["s3"],
    )  # fmt: skip
    cluster.apply(*objects)
    yield named(objects, "CronJob")
    cluster.kubectl("delete", "cronjob", "nightly", "--wait=true")


def test_it_trains_once_for_two_ticks_and_again_after_a_change(cluster, nightly):
    ticks = until(lambda: found if len(found := finished_ticks(cluster)) >= 2 else None, seconds=420)
    (_, first), (_, second) = ticks[:2]
    assert told(first, "due")
    assert not told(first, "unchanged")
    assert told(second, "unchanged")
    assert not [event for event in second if event["stage"] == "train_head"]
    in_store(cluster, "s3", ONE_MORE.format(bucket=BUCKET))

    def trained_again():
        later = finished_ticks(cluster)[2:] if len(finished_ticks(cluster)) > 2 else []
        return [events for _, events in later if told(events, "due")]

    (events, *_) = until(trained_again, seconds=420)
    assert "images have changed" in told(events, "due")[0]["reason"]


def test_no_credential_is_in_a_log_or_an_object_or_a_result(cluster, nightly, toolbox):
    """After the test above, which has made all of them."""
    logs = [cluster.logs(f"job/{job['metadata']['name']}") for job, _ in finished_ticks(cluster)]
    kinds = ("pods", "jobs", "cronjobs", "configmaps", "events")
    objects = [json.dumps(cluster.get(kind)) for kind in kinds]
    published = in_store(
        cluster,
        "s3",
        f"from kubegraft.storage import fetch_tree; import pathlib; fetch_tree({TARGET!r}, '/tmp/seen'); "
        "print('\\n'.join(p.read_text(errors='replace') for p in pathlib.Path('/tmp/seen').rglob('*.*') "
        "if p.suffix in ('.json', '.html')))",
    )
    for text in (*logs, *objects, published):
        assert SECRET_KEY not in text
        assert ACCESS_KEY not in text


def test_without_the_secret_the_bucket_is_closed_and_the_reason_is_said(cluster, stores, rendered):
    objects = rendered("job", SOURCE, "--name", "stranger")
    job = next(one for one in objects if one["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    container["env"] += [{"name": "AWS_ENDPOINT_URL", "value": "http://s3:8333"}]
    cluster.apply(*objects)
    name = job["metadata"]["name"]
    until(lambda: cluster.get("job", name)["status"].get("failed"), seconds=180)
    said = cluster.logs(f"job/{name}")
    assert "could not be read" in said.splitlines()[-1]
    cluster.kubectl("delete", "job", name)
