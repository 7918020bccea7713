"""What the image of standin.Dockerfile runs in place of `kubegraft`: says what a pod says, and does as it is told.

The job's `ingest.source` tells: /standin/<behaviour>/<seconds of each stage>. Behaviours: `ok`; `memory` (takes more
than there is, in `train`); `disk` (fills a file system, in `train`); `crash` (exit code 1, in `train`).
"""

import json
import os
import pathlib
import re
import signal
import sys
import time

TERMINATION = pathlib.Path(os.environ.get("KUBEGRAFT_TERMINATION_FILE", "/dev/termination-log"))
STAGES = {
    "prepare": ("ingest",),
    "train": ("train_head", "fine_tune"),
    "finish": ("evaluate", "export"),
    "look": ("ingest",),
}


def line(**values) -> str:
    return json.dumps({"kubegraft_report": values})


def end(code: int, **values) -> None:
    TERMINATION.write_text(line(exit_code=code, **values))
    sys.stdout.flush()
    os._exit(code)


def fill_memory() -> None:
    kept = []
    while True:
        kept.append(bytearray(os.urandom(1 << 20) * 8))


def fill_disk() -> None:
    try:
        with open("/dev/shm/full", "wb", buffering=0) as file:  # noqa: PTH123
            while True:
                if file.write(bytes(1 << 20)) < 1 << 20:
                    file.write(b"the rest")
    except OSError as error:
        message = f"The system refused to write. Received: {type(error).__name__}: {error}."
        end(8, stage="fine_tune", error="StorageError", message=message)


def main(role: str, arguments: list[str]) -> None:
    config = pathlib.Path(arguments[arguments.index("--config") + 1]).read_text()
    _, behaviour, seconds = re.search(r"source: /(standin)/(\w+)/([\d.]+)", config).groups()
    first = os.environ.get("TASK_INDEX", "0") == "0"
    signal.signal(signal.SIGTERM, lambda *_: end(143, stage=STAGES[role][-1]))
    for stage in STAGES[role]:
        for progress in range(0, 101, 50):
            if first:
                print(line(stage=stage, progress=progress), flush=True)  # noqa: T201
            time.sleep(float(seconds) / 3)
        if stage == "fine_tune" and behaviour == "memory":
            fill_memory()
        if stage == "fine_tune" and behaviour == "disk":
            fill_disk()
        if stage == "fine_tune" and behaviour == "crash":
            sys.exit("a crash")
    last = {"stage": STAGES[role][-1], "progress": 100, "done": True}
    if role in ("prepare", "look"):
        last["dataset_digest"] = "d" * 64
    if role == "train":
        last["metrics"] = {"validation_accuracy": 0.9}
    if role == "finish":
        last |= {"model_uri": "/artifacts/standin/model", "metrics": {"test_accuracy": 0.875}}
    end(0, **last)


if __name__ == "__main__":
    main(sys.argv[2], sys.argv)
