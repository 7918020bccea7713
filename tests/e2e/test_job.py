"""A Job runs the whole pipeline on real photographs, and what it exports answers."""

import json

from tests.e2e.conftest import BUCKET, in_store


def unseen(photographs):
    """Name a validation photograph of each class: the model was chosen by them, but not trained on them."""
    return [
        f"/workspace/data/signs/validation/{folder.name}/{sorted(folder.iterdir())[1].name}"
        for folder in sorted((photographs / "validation").iterdir())
    ]


def predictions(cluster, toolbox, model, images):
    command = ("kubegraft", "predict", model, *images, "--json")
    return json.loads(cluster.execute(toolbox, *command))


def test_a_job_trains_on_photographs_to_a_model_that_answers(cluster, toolbox, trained, photographs):
    summary = json.loads(cluster.execute(toolbox, "cat", "/workspace/signs/run.json"))
    assert summary["test"]["test_accuracy"] > 0.8
    images = unseen(photographs)
    answers = predictions(cluster, toolbox, "/workspace/signs/model", images)
    right = [answer["path"].split("/")[-2] == answer["class"] for answer in answers]
    assert len(right) == len(images)
    assert sum(right) >= 0.8 * len(right)


def test_its_log_has_one_event_a_line_from_every_stage(cluster, trained):
    lines = [line for line in cluster.logs(f"job/{trained}").splitlines() if line.startswith("{")]
    events = [json.loads(line) for line in lines]
    assert {"ingest", "train_head", "fine_tune", "evaluate", "export"} <= {event["stage"] for event in events}


def test_applying_it_again_changes_nothing(cluster, trained, rendered, stores):
    again = rendered(
        "job", "/workspace/data/signs", "--name", "signs", "--publish", f"gs://{BUCKET}/signs", "--secret", stores["gs"]
    )  # fmt: skip
    said = cluster.apply(*again)
    assert said.count("unchanged") == len(again)


def test_what_it_published_is_the_model_that_is_on_the_volume(cluster, toolbox, trained, photographs):
    images = unseen(photographs)[:3]
    fetch = f"from kubegraft.storage import fetch_tree; fetch_tree('gs://{BUCKET}/signs', '/tmp/published')"
    in_store(cluster, "gs", fetch)
    published = predictions(cluster, toolbox, "/tmp/published/model", images)
    assert published == predictions(cluster, toolbox, "/workspace/signs/model", images)
