"""`kubegraft run --dry-run`: what a run would do, without doing any of it."""

import json

import pytest
from click.testing import CliRunner

from kubegraft.cli import main

GIB = 2**30


def dry_run(*arguments, exit_code=0):
    done = CliRunner().invoke(main, ["run", "--dry-run", *map(str, arguments)])
    assert done.exit_code == exit_code, done.output
    return done


def test_the_plan_for_a_million_images_keeps_within_the_machine(tmp_path):
    done = dry_run("--num-images", 1_000_000, "--memory-gib", 16, "--disk-gib", 200, "--json")
    plan = json.loads(done.stdout)
    assert sum(plan["images"].values()) == 1_000_000
    assert plan["memory_bytes"] == 16 * GIB
    assert plan["fine_tune"]["way"] == "activations"
    assert plan["fine_tune"]["num_views"] == 1
    # Shards and features are written before, and half of what is left then may be taken.
    written = plan["written_before_fine_tuning_bytes"]
    assert written == plan["image_bytes"] + plan["pooled_features_bytes"] > 100 * GIB
    assert 0 < plan["fine_tune"]["disk_bytes"] <= (200 * GIB - written) / 2
    assert [row["num_blocks"] for row in plan["cuts"]] == list(range(1, 16))
    assert any(row["fits"] == "no" for row in plan["cuts"])


def test_images_that_the_disk_does_not_hold_are_told(tmp_path):
    arguments = ("--num-images", 1_000_000, "--memory-gib", 16, "--disk-gib", 50)
    plan = json.loads(dry_run(*arguments, "--json").stdout)
    assert plan["fine_tune"]["way"] != "activations"
    assert "more than is free" in dry_run(*arguments).stdout


def test_a_folder_is_counted_and_nothing_written(image_folder, tmp_path):
    folder = image_folder(classes=3, per_class=20)
    output = tmp_path / "output"
    plain = dry_run(folder, "--output", output, "--backbone", "mobilenet_v3_small", "--num-blocks", 2).stdout
    assert "45 train" in plain
    assert "activations: " in plain
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--num-images", "100"], "`num_images` is for --dry-run only"),
        (["run", "--dry-run", "gs://bucket/photos"], "--num-images"),
        (
            ["run", "--dry-run", "--num-images", "100", "--num-blocks", "99"],
            "`num_blocks` must be at most 16",
        ),
    ],
    ids=["without --dry-run", "a bucket", "more blocks than there are"],
)
def test_what_cannot_be_planned_is_said(arguments, message):
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert message in done.stderr
