"""What is made beside `ingest` is what `train_head` looks for; where that can't be known nothing is made."""

import json

import pytest

from kubegraft import preparation
from kubegraft.config import FineTuneConfig, HeadConfig, IngestConfig
from kubegraft.data.ingest import ingest
from kubegraft.modeling.engines import choice
from kubegraft.preparation import preparation_arguments, prepare, worth_preparing
from kubegraft.run_config import RunConfig, from_parameters
from kubegraft.training import frozen_backbone
from kubegraft.training.head import train_head


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    monkeypatch.setenv("KUBEGRAFT_CACHE", str(tmp_path / "features"))


def config_for(source, **head):
    head = {"backbone": "mobilenet_v2", "weights": "none", "input_size": 32, "num_epochs": 1, **head}
    return RunConfig(
        seed=3,
        ingest=IngestConfig(source=str(source)),
        head=HeadConfig(**head),
        fine_tune=FineTuneConfig(num_blocks=2, augmentation="mixup"),
    )


def fails(*_args, **_options):
    pytest.fail("must not be called")  # no Exception, which those who can do without an engine catch


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    monkeypatch.setattr(preparation, "usable_processors", lambda: 2)
    monkeypatch.setattr(preparation, "usable_memory_bytes", lambda: 2**33)


@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_prepared_is_what_the_head_looks_for(image_folder, tmp_path, monkeypatch, damaged):
    images = image_folder(per_class=12, size=40)
    if damaged:
        images.joinpath("class_0", "0.png").write_bytes(b"no image")
    run_config = config_for(images)
    monkeypatch.setattr(choice, "_ratio", lambda *_: 2.0)  # on so small a network the clock may say anything
    prepare(run_config)
    monkeypatch.setattr(choice, "convert", fails)
    ingest(tmp_path / "dataset", run_config.ingest)
    # As the component calls it, which is told no more of fine-tuning.
    next_config = FineTuneConfig(num_blocks=2, unfreeze_fraction=run_config.fine_tune.unfreeze_fraction)
    trained = train_head(tmp_path / "dataset", tmp_path / "head", run_config.head, next_config)
    assert trained.metrics["features_computed"] > 0


def test_a_process_is_told_the_config_of_the_run(image_folder):
    run_config = config_for(image_folder(), head="mlp", hidden_units=(8, 4), mixed_precision="off")
    told = from_parameters(json.loads(*preparation_arguments(run_config)))
    assert (told.ingest, told.head, told.fine_tune) == (
        run_config.ingest,
        run_config.head,
        run_config.fine_tune,
    )


@pytest.mark.parametrize(
    "source", ["gs://bucket/images", "sample://digits", "{folder}/0.zip", "no/such/folder"]
)
def test_only_a_folder_that_is_here_is_worth_it(image_folder, source):
    folder = image_folder()
    folder.joinpath("0.zip").write_bytes(b"")
    assert worth_preparing(config_for(folder))
    assert not worth_preparing(config_for(source.format(folder=folder)))


@pytest.mark.parametrize("engine", ["keras", "litert"])
def test_an_engine_that_was_asked_for_needs_no_verdict(image_folder, monkeypatch, engine):
    monkeypatch.setenv(preparation.ENGINE_VARIABLE, engine)
    assert choice.ENGINE_VARIABLE == preparation.ENGINE_VARIABLE
    assert not worth_preparing(config_for(image_folder()))


@pytest.mark.parametrize("used", ["distribution.has_gpu", "cluster_spec.find_cluster"])
def test_neither_a_gpu_nor_a_cluster_is_touched(image_folder, monkeypatch, used):
    monkeypatch.setattr(f"kubegraft.training.{used}", lambda: True)
    monkeypatch.setattr(preparation, "_Images", fails)  # decoding alone would open the device
    monkeypatch.setattr(frozen_backbone, "make_strategy", fails)
    prepare(config_for(image_folder()))


@pytest.mark.parametrize(("ratio", "num_verdicts"), [(0.8, 0), (2.0, 1)])
def test_a_trial_that_is_lost_beside_other_work_is_not_kept(
    image_folder, tmp_path, monkeypatch, ratio, num_verdicts
):
    monkeypatch.setattr(choice, "_ratio", lambda *_: ratio)
    prepare(config_for(image_folder()))
    assert len(list(tmp_path.glob("machine/kubegraft/engines/*.json"))) == num_verdicts


@pytest.mark.parametrize("limit", [("usable_processors", 1), ("usable_memory_bytes", 2**31)])
def test_a_small_machine_has_no_room_for_it(image_folder, monkeypatch, limit):
    monkeypatch.setattr(preparation, limit[0], lambda: limit[1])
    assert not worth_preparing(config_for(image_folder()))


def test_weights_that_must_be_downloaded_are_left_to_the_stage(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(frozen_backbone, "frozen_classifier", fails)
    prepare(config_for(image_folder(), weights="imagenet", backbone="densenet_121"))


def test_many_files_are_not_listed_twice(image_folder, monkeypatch):
    monkeypatch.setattr(preparation, "_MOST_FILES", 5)
    monkeypatch.setattr(frozen_backbone, "prepare_engine", fails)
    prepare(config_for(image_folder(per_class=6)))


def test_what_is_wrong_is_left_to_the_run_to_say(image_folder, monkeypatch):
    images = image_folder(classes=2, per_class=3)
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    monkeypatch.setattr("sys.argv", ["", *preparation_arguments(config_for(images))])
    with pytest.raises(SystemExit, match="Nothing was prepared: `source` must hold images"):
        preparation.main()
