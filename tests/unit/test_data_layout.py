import os

import pytest

from kubegraft.data.layout import read_layout
from kubegraft.errors import DataError


def make(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def by_path(layout):
    return {file.path: file for file in layout.files}


@pytest.mark.parametrize(
    ("validation", "test"), [("validation", "test"), ("val", "testing"), ("valid", "Test")]
)
def test_folders_of_splits(tmp_path, validation, test):
    root = make(
        tmp_path, "train/a/1", "train/b/deep/er/2", f"{validation}/a/3", f"{validation}/b/4", f"{test}/b/5"
    )
    layout = read_layout(root)
    assert layout.classes == ("a", "b")
    assert layout.given == {"train", "validation", "test"}
    assert {(file.split, file.label) for file in layout.files} == {
        ("train", "a"),
        ("train", "b"),
        ("validation", "a"),
        ("validation", "b"),
        ("test", "b"),
    }
    assert by_path(layout)["train/b/deep/er/2"].label == "b"
    assert any("'a'" in warning and "test" in warning for warning in layout.warnings)


def test_one_folder_of_classes(tmp_path):
    layout = read_layout(make(tmp_path, "b/1", "a/2", "10/3", "9/4", "README.txt"))
    assert layout.classes == ("10", "9", "a", "b")
    assert layout.given == frozenset()
    assert by_path(layout)["README.txt"].reason == "outside_classes"


def test_a_class_may_be_called_train(tmp_path):
    assert read_layout(make(tmp_path, "train/1", "car/2", "plane/3")).classes == ("car", "plane", "train")


def test_a_test_folder_without_classes_is_carved_instead_and_warned_of(tmp_path):
    layout = read_layout(make(tmp_path, "train/a/1", "train/b/2", "test/3", "test/4"))
    assert layout.given == {"train"}
    assert any("2 files directly in 'test'" in warning for warning in layout.warnings)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("1.jpg", "2.jpg"), "0 folders and 2 files"),
        ((), "0 folders and 0 files"),
        (("a/1", "1.jpg"), r"1 folder \(a\) and 1 file"),
        (("images/train/a/1", "images/train/b/1"), "Did you mean .*images"),
        (("train/1", "validation/2"), "No train folder with a folder for each class"),
        (("validation/a/1", "test/a/2"), "No train folder with a folder for each class"),
        (("train/a/1", "train/b/1", "val/a/1", "valid/a/1"), "Both val and valid"),
        (("train/a/1",), "1 class folder; a classifier needs two"),
    ],
    ids=[
        "files",
        "empty",
        "one-class",
        "one-too-high",
        "no-classes",
        "no-train",
        "twice",
        "one-class-in-train",
    ],
)
def test_no_layout_says_what_was_found_and_what_is_accepted(tmp_path, paths, message):
    with pytest.raises(DataError, match=message) as error:
        read_layout(make(tmp_path, *paths))
    assert "train/<class>/*.jpg" in str(error.value)


def test_a_class_that_train_lacks_gets_a_suggestion(tmp_path):
    with pytest.raises(DataError, match="Did you mean 'daisies'"):
        read_layout(make(tmp_path, "train/daisies/1", "train/roses/1", "validation/daisy/1"))


def test_an_archives_single_top_folder_is_looked_through(tmp_path):
    root = make(tmp_path, "flowers/a/1", "flowers/b/2", "__MACOSX/flowers/._a")
    layout = read_layout(root, strip_top_folder=True)
    assert layout.classes == ("a", "b")
    assert by_path(layout)["__MACOSX/flowers/._a"].reason == "system_file"


def test_links_are_followed_unless_they_lead_back(tmp_path):
    elsewhere = make(tmp_path / "elsewhere", "5")
    root = make(tmp_path / "root", "a/1", "b/2", "b/inner/3")
    (root / "a" / "linked").symlink_to(elsewhere)
    (root / "a" / "up").symlink_to("..")
    (root / "c").symlink_to(".")
    (root / "a" / "itself").symlink_to("itself")
    (root / "a" / "broken").symlink_to("nowhere")
    (root / "b" / "again").symlink_to("inner")
    (root / "a" / "same").symlink_to("1")
    os.mkfifo(root / "b" / "pipe")
    layout = read_layout(root)
    reasons = {file.path: file.reason for file in layout.files}
    assert layout.classes == ("a", "b")
    assert reasons == {
        "a/1": "",
        "a/same": "",
        "a/linked/5": "",
        "a/up": "symlink_loop",
        "a/itself": "symlink_loop",
        "a/broken": "broken_link",
        "b/2": "",
        "b/again/3": "",
        "b/inner": "repeated_folder",
        "b/pipe": "not_a_file",
        "c": "symlink_loop",
    }


def test_hidden_and_system_files_are_counted_but_no_class(tmp_path):
    layout = read_layout(
        make(tmp_path, "a/1", "b/2", "a/.DS_Store", "b/Thumbs.db", ".git/config", "a/.ipynb_checkpoints/1")
    )
    assert layout.classes == ("a", "b")
    assert [file.path for file in layout.files if file.reason == "system_file"] == [
        ".git/config",
        "a/.DS_Store",
        "a/.ipynb_checkpoints/1",
        "b/Thumbs.db",
    ]


def test_names_of_any_bytes_are_shown_as_utf8(tmp_path):
    root = make(tmp_path, "a/1", "b/2")
    (root / "a" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    assert "a/caf\\xe9.jpg" in by_path(read_layout(root))


def test_an_umlaut_is_one_class_however_it_is_spelled(tmp_path):
    root = make(tmp_path, "train/M\u00fcll/1", "train/b/2", "validation/Mu\u0308ll/3")
    assert read_layout(root).classes == ("M\u00fcll", "b")


def test_a_link_that_leads_above_the_root_is_not_followed(tmp_path):
    root = make(tmp_path / "photos", "a/1", "b/2").absolute()
    make(tmp_path, "beside/3")
    (root / "a" / "above").symlink_to("../..")
    (root / "up").symlink_to("..")
    layout = read_layout(root)
    assert layout.classes == ("a", "b")
    assert {file.path: file.reason for file in layout.files} == {
        "a/1": "",
        "a/above": "symlink_loop",
        "b/2": "",
        "up": "symlink_loop",
    }
