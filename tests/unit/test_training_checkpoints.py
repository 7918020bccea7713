import numpy as np
import pytest

from kubegraft.errors import TrainingError
from kubegraft.training.checkpoints import load_checkpoint, save_checkpoint


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    arrays = {
        "a": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32),
        "n": np.array(7, np.int64),
    }
    position = {"epoch": 2, "history": {"epochs": [{"loss": 0.1}]}}
    save_checkpoint(tmp_path / "c", arrays, position)
    loaded, found = load_checkpoint(tmp_path / "c")
    assert found == position
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "c") is None


def test_a_write_that_was_cut_short_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "c"
    save_checkpoint(path, {"a": np.ones(3)}, {"step": 1})
    (tmp_path / "c.partial").write_bytes(path.read_bytes()[:20])
    assert load_checkpoint(path)[1] == {"step": 1}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 rubbish"], ids=["empty", "rubbish"])
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path, content):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(TrainingError, match="Remove it to start"):
        load_checkpoint(tmp_path / "c")


def test_pickled_arrays_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pickle"):
        save_checkpoint(tmp_path / "c", {"evil": np.array([{}], object)}, {})
