import functools
import json
import shutil

import pytest
from click.testing import CliRunner

from kubegraft import __version__, storage, unchanged
from kubegraft.cli import main
from kubegraft.config_file import to_values
from kubegraft.run_config import from_parameters
from kubegraft.unchanged import unchanged_summary


@pytest.fixture
def finished(tmp_path, image_folder):
    """Return a function that writes what a finished run left, and the config that it ran."""

    def finish(digest, **changes):
        config = from_parameters({"source": str(image_folder())})
        output_dir = tmp_path / "output"
        (output_dir / "model").mkdir(parents=True)
        summary = {"kubegraft": __version__, "config": to_values(config), "digests": {"ingest": digest}}
        (output_dir / "run.json").write_text(json.dumps(summary | changes))
        return config, output_dir

    return finish


@pytest.fixture
def no_reading(monkeypatch):
    def fail(*_):
        raise AssertionError("read the images, although something cheaper had changed")

    monkeypatch.setattr(unchanged, "_digest_now", fail)


def test_only_changed_images_are_due(finished, capfd):
    config, output_dir = finished("")
    digest = unchanged._digest_now(config, output_dir)
    summary = json.loads((output_dir / "run.json").read_text())
    (output_dir / "run.json").write_text(json.dumps(summary | {"digests": {"ingest": digest}}))
    skipped = unchanged_summary(config, output_dir)
    assert digest[:16] in skipped["skipped"]
    assert "run: unchanged" in capfd.readouterr().err
    (next((output_dir.parent / "images" / "class_0").iterdir())).unlink()
    assert unchanged_summary(config, output_dir) is None
    assert "the images have changed" in capfd.readouterr().err
    assert not (output_dir / "work" / "check").exists()


def test_images_that_cant_be_read_are_the_runs_to_report(finished, capfd):
    config, output_dir = finished("d")
    shutil.rmtree(config.ingest.source)
    assert unchanged_summary(config, output_dir) is None
    assert "can't be read" in capfd.readouterr().err


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kubegraft": "0.0.1"}, "by kubegraft 0.0.1"),
        ({"config": {}}, "the config has changed"),
        ({"digests": {}}, "no earlier run"),
    ],
)
def test_what_is_cheap_to_compare_is_compared_first(finished, capfd, changes, reason):
    config, output_dir = finished("d", **changes)
    assert unchanged_summary(config, output_dir) is None
    assert reason in capfd.readouterr().err


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("damage", ["missing", "half-written", "model gone"])
def test_without_a_whole_earlier_run_it_is_due(finished, damage):
    config, output_dir = finished("d")
    if damage == "missing":
        (output_dir / "run.json").unlink()
    elif damage == "half-written":
        (output_dir / "run.json").write_text('{"kubegraft')
    else:
        (output_dir / "model").rmdir()
    assert unchanged_summary(config, output_dir) is None


def test_an_earlier_run_is_found_where_it_was_published(finished, tmp_path, monkeypatch):
    config, output_dir = finished("d")
    shutil.copytree(output_dir, tmp_path / "published")
    uri = str(tmp_path / "published")
    monkeypatch.setattr(unchanged, "_digest_now", lambda *_: "d")
    shutil.rmtree(output_dir)
    assert unchanged_summary(config, output_dir, uri) is None  # published elsewhere
    summary = json.loads((tmp_path / "published" / "run.json").read_text())
    (tmp_path / "published" / "run.json").write_text(json.dumps(summary | {"published": uri}))
    assert unchanged_summary(config, output_dir, uri)["skipped"]
    assert unchanged_summary(config, output_dir) is None


@pytest.mark.usefixtures("no_reading")
def test_a_run_whose_results_were_not_published_is_due(finished, tmp_path, capfd):
    uri = str(tmp_path / "published")
    config, output_dir = finished("d", published=uri)
    (output_dir / ".kubegraft-unpublished").touch()
    assert unchanged_summary(config, output_dir, uri) is None
    assert "was not published" in capfd.readouterr().err


@pytest.mark.parametrize("object_store", ["gs", "s3"], indirect=True)
def test_a_publication_that_was_broken_off_is_due(finished, object_store, tmp_path, monkeypatch):
    monkeypatch.setattr(unchanged, "_digest_now", lambda *_: "d")
    at_once = functools.partial(storage.fetch_whole_tree, retry_waits_seconds=())
    monkeypatch.setattr(storage, "fetch_whole_tree", at_once)
    uri = object_store.folder
    config, output_dir = finished("d", published=uri)
    storage.publish_tree(output_dir, uri)
    shutil.rmtree(output_dir)
    assert unchanged_summary(config, output_dir, uri)["skipped"]
    storage.fetch_file(f"{uri}/_kubegraft.json", tmp_path / "record")
    record = json.loads((tmp_path / "record").read_text())
    object_store.put({"_kubegraft.json": json.dumps(record | {"state": "publishing"}).encode()})
    assert unchanged_summary(config, output_dir, uri) is None


def test_credentials_of_weights_are_no_change(finished, monkeypatch):
    config, output_dir = finished("d")
    weights = "https://user:word@example/w.h5?sig=1"
    config = config.with_values({("head", "weights"): weights})
    summary = json.loads((output_dir / "run.json").read_text())
    summary["config"]["head"]["weights"] = "https://example/w.h5"
    (output_dir / "run.json").write_text(json.dumps(summary))
    monkeypatch.setattr(unchanged, "_digest_now", lambda *_: "d")
    assert unchanged_summary(config, output_dir)["skipped"]


def test_a_run_that_would_repeat_the_one_before_ends_green_with_the_reason(finished, monkeypatch):
    config, output_dir = finished("d" * 64, report="report.html")
    (output_dir / ".kubegraft-run").touch()
    monkeypatch.setattr(unchanged, "_digest_now", lambda *_: "d" * 64)
    before = (output_dir / "run.json").read_bytes()
    command = ["run", config.ingest.source, "--output", str(output_dir), "--if-changed"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert "nothing to do  the images have the digest" in result.stdout
    assert (output_dir / "run.json").read_bytes() == before
    assert not (output_dir / "kfp").exists()
