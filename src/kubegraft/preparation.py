"""What a local run's first training needs, made beside `ingest`: `python -m kubegraft.preparation PARAMETERS`.

`ingest` waits for files where making an engine waits for one processor, so both take little longer than one of them.
Nothing depends on it: what is prepared is found in this user's cache, and what is not there the stage makes itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kubegraft import storage
from kubegraft.config import FineTuneConfig
from kubegraft.errors import DataError, KubegraftError
from kubegraft.machine_limits import usable_memory_bytes
from kubegraft.processes import end_with_run
from kubegraft.processors import usable_processors
from kubegraft.run_config import RunConfig, from_parameters, pipeline_parameters

if TYPE_CHECKING:
    import numpy as np

    from kubegraft.data.folders import FoundFile
    from kubegraft.data.layout import Layout

PREPARATION: Final = "kubegraft.preparation"
# As in `modeling.engines`, which imports TensorFlow.
ENGINE_VARIABLE: Final = "KUBEGRAFT_ENGINE"
# With more files the seconds saved don't count, and to list them twice takes as long.
_MOST_FILES: Final = 20_000
_NUM_IMAGES: Final = 8
_LEAST_MEMORY_BYTES: Final = 4 * 2**30


def worth_preparing(run_config: RunConfig) -> bool:
    """Return whether there is something to gain.

    A second processor, memory for a second backbone, an engine that is to be chosen, and a folder whose images can be
    seen now.
    """
    source = run_config.ingest.source
    return (
        usable_processors() > 1
        and usable_memory_bytes() >= _LEAST_MEMORY_BYTES
        and (os.environ.get(ENGINE_VARIABLE) or "auto") == "auto"
        and not storage.is_remote(source)
        and storage.local_path(source).is_dir()
    )


def preparation_arguments(run_config: RunConfig) -> list[str]:
    """Return the arguments with which this module, as a process, prepares a run."""
    return [json.dumps(pipeline_parameters(run_config))]


def main() -> None:
    """Prepare, as a process of its own; whatever is wrong the run itself will say."""
    end_with_run()
    try:
        prepare(from_parameters(json.loads(sys.argv[1])))
    except (KubegraftError, OSError) as error:
        sys.exit(f"Nothing was prepared: {error}")


def prepare(run_config: RunConfig) -> None:
    """Make the engine that `train_head` will choose for the images that `ingest` is going to find.

    Nothing on GPUs, or with other workers: there TensorFlow computes features, and this process must not touch them.

    Raises:
        KubegraftError: What the stages of the run would raise.
    """
    import kubegraft.tensorflow_setup  # noqa: F401 - before TensorFlow
    from kubegraft.data.layout import read_layout
    from kubegraft.run_plan import counts_of
    from kubegraft.training import cluster_spec, distribution
    from kubegraft.training.frozen_backbone import prepare_engine

    if distribution.has_gpu() or cluster_spec.find_cluster():
        return
    folder = storage.local_path(run_config.ingest.source)
    if sum(1 for _ in islice(folder.rglob("*"), _MOST_FILES)) == _MOST_FILES:
        return
    layout = read_layout(folder)
    few = _Images(layout)
    facts = dataclasses.replace(
        counts_of(layout, run_config).facts(), median_height=few.median(0), median_width=few.median(1)
    )
    # Of fine-tuning, the component `train_head` is told so much.
    cut = {name: getattr(run_config.fine_tune, name) for name in ("num_blocks", "unfreeze_fraction")}
    prepare_engine((run_config.head, FineTuneConfig(**cut)), facts, few.resized)


class _Images:
    """A few images from all over the folders, as `train_head` will see them."""

    def __init__(self, layout: Layout) -> None:
        """Decode them; those that can't be are left out, as by `ingest`."""
        usable = [file for file in layout.files if not file.reason]
        step = max(1, len(usable) // _NUM_IMAGES)
        self._decoded = list(_decoded(usable[::step][:_NUM_IMAGES]))
        if not self._decoded:
            raise DataError(
                "`source` must hold images that can be decoded. Received: a few files that can't."
            )

    def median(self, axis: int) -> int:
        """Return their median height (axis 0) or width (1) in pixels."""
        return int(statistics.median(image.shape[axis] for image in self._decoded))

    def resized(self, size: int) -> np.ndarray:
        """Return them as `float32[num_images, size, size, 3]` in [0, 255]."""
        import numpy as np

        from kubegraft.data.resizing import resize_into

        resized = np.zeros((len(self._decoded), size, size, 3), np.float32)
        for target, image in zip(resized, self._decoded, strict=True):
            resize_into(target, image)
        return resized


def _decoded(files: Sequence[FoundFile]) -> Iterator[np.ndarray]:
    from kubegraft.data.decode import decode_bytes

    for file in files:
        with contextlib.suppress(Exception):  # Pillow raises whatever its plugins raise on damaged bytes
            yield decode_bytes(Path(file.location).read_bytes())


if __name__ == "__main__":
    main()
