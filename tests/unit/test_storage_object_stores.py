"""Reading and publishing by gs:// and s3://, against real servers behind a proxy that breaks things."""

import os
import subprocess
import sys
from urllib.parse import unquote

import numpy as np
import pytest

from kubegraft.config import IngestConfig
from kubegraft.data.ingest import ingest
from kubegraft.errors import ConfigError, StorageError
from kubegraft.storage import (
    check_target,
    exists,
    fetch_file,
    fetch_tree,
    fetch_whole_tree,
    list_files,
    publish_tree,
)
from tests.object_stores import SECRET

NO_WAIT = (0.0, 0.0, 0.0)
SHORT_WAITS = (0.1, 0.3, 1.0, 3.0)  # the emulator of gs:// refuses some of many connections at once
CONTENT = np.random.default_rng(0).bytes(300_000)
FILES = {"a/1.bin": CONTENT, "a/2 ü?#.bin": b"two", "b/3.bin": CONTENT[::-1]}


def written(directory, files):
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def read(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def fetched(store, target):
    fetch_tree(store.folder, target, retry_waits_seconds=NO_WAIT)
    return read(target)


def is_download(method, path):
    return method == "GET" and ".bin" in path


def is_upload(method, path):
    return method in ("PUT", "POST") and (
        "uploadType=" in path or ("/bucket/" in path and "/storage/" not in path)
    )


def is_any(method, path):
    return True


def test_a_folder_arrives_whole(object_store, tmp_path):
    object_store.put(FILES)
    assert fetched(object_store, tmp_path / "here") == FILES
    assert {file.path: file.size for file in list_files(object_store.folder)} == {
        name: len(content) for name, content in FILES.items()
    }
    fetch_file(f"{object_store.folder}/a/1.bin", tmp_path / "one", retry_waits_seconds=NO_WAIT)
    assert (tmp_path / "one").read_bytes() == CONTENT


def test_existence_of_files_and_folders(object_store):
    object_store.put(FILES)
    folder = object_store.folder
    assert exists(folder)
    assert exists(f"{folder}/a")
    assert exists(f"{folder}/a/1.bin")
    assert not exists(f"{folder}/a/1")
    assert not exists(f"{folder}/nothing")


@pytest.mark.parametrize("fault", ["drop", 500, 503, 429, "truncate", "corrupt"], ids=str)
def test_what_breaks_on_the_way_here_is_fetched_again(object_store, tmp_path, fault):
    object_store.put(FILES)
    object_store.proxy.faults += [(fault, is_download), (fault, is_download)]
    assert fetched(object_store, tmp_path / "here") == FILES
    assert not object_store.proxy.faults
    assert len([path for path in object_store.proxy.requests if ".bin" in path]) == len(FILES) + 2


@pytest.mark.parametrize("fault", ["drop", 503], ids=str)
def test_a_listing_that_breaks_is_asked_for_again(object_store, tmp_path, fault):
    object_store.put(FILES)
    object_store.proxy.faults += [(fault, lambda method, path: "prefix=" in path)]
    assert fetched(object_store, tmp_path / "here") == FILES
    assert not object_store.proxy.faults


@pytest.mark.parametrize("fault", ["drop", 500, 503, "truncate"], ids=str)
def test_what_breaks_on_the_way_there_is_sent_again(object_store, tmp_path, fault):
    source = written(tmp_path / "source", FILES)
    object_store.proxy.faults += [(fault, is_upload)] * 2
    publish_tree(source, object_store.folder, retry_waits_seconds=NO_WAIT)
    assert not object_store.proxy.faults
    assert fetched(object_store, tmp_path / "here") == FILES


@pytest.mark.parametrize("status", [403, 400, 404])
def test_what_will_not_pass_is_not_tried_again(object_store, tmp_path, status):
    object_store.put({"1.bin": b"one"})
    object_store.proxy.faults += [(status, is_download)] * 2
    with pytest.raises(StorageError, match=str(status)):
        fetch_tree(object_store.folder, tmp_path / "here", retry_waits_seconds=NO_WAIT)
    assert len(object_store.proxy.faults) == 1
    assert not read(tmp_path)


def test_a_server_that_stays_broken_is_a_storage_error_without_leftovers(object_store, tmp_path):
    object_store.put(FILES)
    object_store.proxy.broken = is_download
    with pytest.raises(StorageError, match="503") as caught:
        fetch_tree(object_store.folder, tmp_path / "here", retry_waits_seconds=NO_WAIT)
    assert caught.value.retryable
    assert not read(tmp_path)


def test_an_interrupted_fetch_continues_and_trusts_no_stale_file(object_store, tmp_path):
    object_store.put(FILES)
    here = tmp_path / "here"
    assert fetched(object_store, here) == FILES
    (here / "b" / "3.bin").write_bytes(CONTENT)  # as large, but of another content
    object_store.proxy.requests.clear()
    assert fetched(object_store, here) == FILES
    assert len([path for path in object_store.proxy.requests if ".bin" in path]) == 1


def test_a_continued_fetch_keeps_nothing_that_is_gone(object_store, tmp_path):
    object_store.put(FILES)
    here = written(tmp_path / "here", {"a/gone.bin": b"deleted in the bucket since", **FILES})
    for path in here.rglob("*.bin"):
        os.utime(path, (0, 0))
    fetch_tree(object_store.folder, here, exact=True, retry_waits_seconds=NO_WAIT)
    assert read(here) == FILES


@pytest.mark.parametrize("published", [True, False], ids=["published", "plain"])
def test_a_part_of_a_folder_can_be_fetched(object_store, tmp_path, published):
    files = {**FILES, "ab/4.bin": b"a name that begins alike"}
    if published:
        publish_tree(written(tmp_path / "out", files), object_store.folder, retry_waits_seconds=NO_WAIT)
    else:
        object_store.put(files)
    fetch_whole_tree(object_store.folder, tmp_path / "here", part="a", retry_waits_seconds=NO_WAIT)
    assert set(read(tmp_path / "here")) == {"a/1.bin", "a/2 ü?#.bin"}
    with pytest.raises(StorageError, match="no 'c' in it"):
        fetch_whole_tree(object_store.folder, tmp_path / "there", part="c", retry_waits_seconds=NO_WAIT)
    with pytest.raises(ConfigError, match="leads out"):
        fetch_whole_tree(object_store.folder, tmp_path / "there", part="../a", retry_waits_seconds=NO_WAIT)


def test_a_folder_fetched_whole_appears_at_the_end_and_an_interrupted_call_continues(object_store, tmp_path):
    here = tmp_path / "here"
    object_store.put(FILES)
    object_store.proxy.broken = lambda method, path: is_download(method, path) and "/3.bin" in unquote(path)
    with pytest.raises(StorageError):
        fetch_whole_tree(object_store.folder, here, retry_waits_seconds=NO_WAIT)
    assert not here.exists()
    object_store.proxy.broken = None
    object_store.proxy.requests.clear()
    assert fetch_whole_tree(object_store.folder, here, retry_waits_seconds=NO_WAIT) == (3, 600_003)
    assert len([path for path in object_store.proxy.requests if ".bin" in path]) == 1
    assert read(tmp_path) == {f"here/{name}": content for name, content in FILES.items()}


def test_a_folder_fetched_whole_takes_the_place_of_another_only_if_told(object_store, tmp_path):
    here = written(tmp_path / "here", {"precious": b"mine"})
    object_store.put(FILES)
    with pytest.raises(ConfigError, match="holds something"):
        fetch_whole_tree(object_store.folder, here, retry_waits_seconds=NO_WAIT)
    assert read(here) == {"precious": b"mine"}
    fetch_whole_tree(object_store.folder, here, replace=True, retry_waits_seconds=NO_WAIT)
    assert read(tmp_path) == {f"here/{name}": content for name, content in FILES.items()}


def test_many_files_come_in_parallel(object_store, tmp_path):
    names = [f"{number:03d}.bin" for number in range(40)]
    large = np.random.default_rng(1).bytes(200_000)
    source = written(tmp_path / "source", dict.fromkeys(names, large))
    publish_tree(source, object_store.folder, retry_waits_seconds=SHORT_WAITS)
    object_store.proxy.largest_parallel = 0
    assert len(list(list_files(object_store.folder))) == 40
    fetch_tree(object_store.folder, tmp_path / "warm", retry_waits_seconds=SHORT_WAITS)
    assert object_store.proxy.largest_parallel >= 4
    assert read(tmp_path / "warm") == read(source)


def test_memory_does_not_grow_with_the_size_of_a_file(object_store, tmp_path):
    source = written(tmp_path / "source", {"large.bin": bytes(60_000_000)})
    publish_tree(source, object_store.folder, retry_waits_seconds=NO_WAIT)
    # In a process of its own, because the proxy in this one holds whole bodies.
    program = (
        "import resource, sys; from kubegraft.storage import fetch_tree; "
        "memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "fetch_tree(sys.argv[1], sys.argv[2] + '/small'); before = memory(); "
        "fetch_tree(sys.argv[3], sys.argv[2] + '/large'); print(memory() - before)"
    )
    small = f"{object_store.folder}-small"
    publish_tree(written(tmp_path / "small", {"a": b"one"}), small, retry_waits_seconds=NO_WAIT)
    command = [sys.executable, "-c", program, small, str(tmp_path / "here"), object_store.folder]
    grown_kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (tmp_path / "here" / "large" / "large.bin").stat().st_size == 60_000_000
    assert grown_kib < 20_000


def test_publishing_again_changes_nothing_and_replacing_leaves_nothing_stale(object_store, tmp_path):
    source = written(tmp_path / "source", FILES)
    digest = publish_tree(source, object_store.folder, retry_waits_seconds=NO_WAIT)
    keys = object_store.keys()
    assert keys == sorted([*FILES, "_kubegraft.json"])
    assert publish_tree(source, object_store.folder, retry_waits_seconds=NO_WAIT) == digest
    assert not [request for request in object_store.proxy.requests if not request.startswith("GET")]
    (source / "a" / "1.bin").unlink()
    written(source, {"b/3.bin": b"new", "c/4.bin": b"four"})
    object_store.proxy.requests.clear()
    assert publish_tree(source, object_store.folder, retry_waits_seconds=NO_WAIT) != digest
    assert not [request for request in object_store.proxy.requests if "a/2" in unquote(request)]
    assert fetched(object_store, tmp_path / "here") == read(source)
    assert object_store.keys() == sorted([*read(source), "_kubegraft.json"])


def test_an_upload_that_fails_leaves_nothing_to_see_and_is_continued(object_store, tmp_path):
    source = written(tmp_path / "source", FILES)
    uploads = iter(range(100))
    object_store.proxy.broken = lambda method, path: is_upload(method, path) and next(uploads) >= 1
    with pytest.raises(StorageError, match="could not be written"):
        publish_tree(source, object_store.folder, retry_waits_seconds=NO_WAIT)
    object_store.proxy.broken = None
    assert not exists(object_store.folder)
    with pytest.raises(StorageError, match="no object"):
        fetch_tree(object_store.folder, tmp_path / "here", retry_waits_seconds=NO_WAIT)
    object_store.proxy.requests.clear()
    publish_tree(source, object_store.folder, retry_waits_seconds=NO_WAIT)
    assert fetched(object_store, tmp_path / "again") == FILES
    sent = [
        path for path in object_store.proxy.requests if is_upload(*path.split(" ", 1)) and ".partial" in path
    ]
    assert object_store.server.scheme == "gs" or len(sent) == len(FILES) - 1


def test_an_upload_that_fails_leaves_the_earlier_publication_as_it_was(object_store, tmp_path):
    publish_tree(written(tmp_path / "old", FILES), object_store.folder, retry_waits_seconds=NO_WAIT)
    object_store.proxy.broken = is_upload
    with pytest.raises(StorageError):
        publish_tree(
            written(tmp_path / "new", {"a/1.bin": b"new"}), object_store.folder, retry_waits_seconds=NO_WAIT
        )
    object_store.proxy.broken = None
    assert fetched(object_store, tmp_path / "here") == FILES


def test_a_reader_sees_no_half_of_a_switch(object_store, tmp_path):
    publish_tree(written(tmp_path / "old", FILES), object_store.folder, retry_waits_seconds=NO_WAIT)
    new = written(tmp_path / "new", {"a/1.bin": b"new", "b/3.bin": b"new too"})

    def is_copy_of_second(method, path):
        to_place = "rewriteTo" in path or (method == "PUT" and ".partial" not in path)
        return to_place and unquote(path.partition("?")[0]).endswith("b/3.bin")

    object_store.proxy.broken = is_copy_of_second
    with pytest.raises(StorageError):
        publish_tree(new, object_store.folder, retry_waits_seconds=NO_WAIT)
    with pytest.raises(StorageError, match="being published"):
        fetch_tree(object_store.folder, tmp_path / "here", retry_waits_seconds=NO_WAIT)
    assert not read(tmp_path / "here")
    object_store.proxy.broken = None
    publish_tree(new, object_store.folder, retry_waits_seconds=NO_WAIT)
    assert fetched(object_store, tmp_path / "here") == read(new)
    assert object_store.keys() == ["_kubegraft.json", "a/1.bin", "b/3.bin"]


def test_a_published_file_that_was_changed_is_refused(object_store, tmp_path):
    publish_tree(written(tmp_path / "source", FILES), object_store.folder, retry_waits_seconds=NO_WAIT)
    object_store.put({"a/1.bin": CONTENT[::-1]})
    with pytest.raises(StorageError, match="not the one that was published"):
        fetch_tree(object_store.folder, tmp_path / "here", retry_waits_seconds=NO_WAIT)


def test_other_peoples_files_are_never_replaced(object_store, tmp_path):
    object_store.put({"theirs.bin": b"theirs"})
    for attempt in (
        lambda: check_target(tmp_path, object_store.folder),
        lambda: publish_tree(written(tmp_path / "source", FILES), object_store.folder),
    ):
        with pytest.raises(ConfigError, match=r"theirs\.bin"):
            attempt()
    assert object_store.keys() == ["theirs.bin"]


def test_a_missing_bucket_says_so(object_store, tmp_path):
    with pytest.raises(StorageError, match=r"404|NoSuchBucket"):
        fetch_tree(f"{object_store.server.scheme}://no-such-bucket/x", tmp_path, retry_waits_seconds=NO_WAIT)


def test_no_secret_is_in_logs_or_errors(object_store, tmp_path, monkeypatch, capfd):
    object_store.put(FILES)
    object_store.proxy.broken = is_any
    for action in (
        lambda: fetch_tree(object_store.folder, tmp_path / "here", retry_waits_seconds=NO_WAIT),
        lambda: publish_tree(written(tmp_path / "s", FILES), object_store.folder, retry_waits_seconds=(0.0,)),
    ):
        with pytest.raises(StorageError) as caught:
            action()
        assert SECRET not in str(caught.value)
        assert os.environ.get("AWS_ACCESS_KEY_ID", SECRET) not in str(caught.value)
    logged = "".join(capfd.readouterr())
    assert "retrying" in logged
    assert SECRET not in logged
    assert "AKIDEXAMPLE" not in logged


@pytest.mark.parametrize("object_store", ["gs"], indirect=True)
def test_the_emulator_may_be_named_without_a_scheme(object_store, tmp_path, monkeypatch):
    object_store.put(FILES)
    host = os.environ["STORAGE_EMULATOR_HOST"].removeprefix("http://")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
    assert fetched(object_store, tmp_path / "here") == FILES


def test_ingest_reads_the_same_dataset_from_a_bucket(object_store, tmp_path, image_folder):
    images = image_folder()
    publish_tree(images, object_store.folder, retry_waits_seconds=NO_WAIT)
    object_store.proxy.faults += [("truncate", lambda method, path: path.partition("?")[0].endswith("png"))]
    from_bucket = ingest(tmp_path / "remote", IngestConfig(source=object_store.folder))
    local = ingest(tmp_path / "local", IngestConfig(source=str(images)))
    assert from_bucket.digest == local.digest
    assert from_bucket.metrics["num_accepted"] == 24
