"""`python -m benchmarks.scaling DATA`: two workers on a core each against one worker on one core.

All run the stage `fine_tune` itself, on one dataset and model and with as many images a worker and step; each process
is bound to one core and one thread before TensorFlow is loaded. What is compared is whole epochs, validation and
checkpoints included, without the first, which compiles. Rounds alternate, so that a busy machine slows both.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

_THREADS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--num-blocks",
    default=5,
    show_default=True,
    help="Last blocks that train; 16 runs the whole graph in each step.",
)
@click.option("--batch-size", default=32, show_default=True, help="Images of a step for each worker.")
@click.option("--epochs", default=3, show_default=True, help="Epochs, of which the first is not counted.")
@click.option("--rounds", default=3, show_default=True, help="How often each is measured.")
@click.option(
    "--work-dir", type=click.Path(path_type=Path), help="Where to work.  [default: a temporary directory]"
)
def scaling(
    data: Path,
    num_blocks: int,
    batch_size: int,
    epochs: int,
    rounds: int,
    work_dir: Path | None,
) -> None:
    """Print a table of images a second, and how much faster two workers are than one."""
    with tempfile.TemporaryDirectory() as temporary:
        root = work_dir or Path(temporary)
        _prepare(root, data)
        plan = {
            "num_blocks": num_blocks,
            "num_epochs": epochs,
            "batch_size": batch_size,
            "augmentation": "none",
        }
        print(
            f"{'round':>5} {'1 worker':>10} {'2 workers':>10} {'ratio':>6} {'waiting':>8}  images/s",
            flush=True,
        )
        ratios = []
        for number in range(rounds):
            one, _ = _measured(root, plan, 1, f"{number}-one")
            two, waiting = _measured(root, plan, 2, f"{number}-two")
            ratios.append(two / one)
            print(f"{number:5} {one:10.1f} {two:10.1f} {ratios[-1]:6.2f} {waiting:8.1%}", flush=True)
        print(f"median ratio {statistics.median(ratios):.2f}")


def _prepare(root: Path, data: Path) -> None:
    """Make the dataset, a head and the features that all processes find."""
    root.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--prepare", str(root), str(data)],
        env=_environment(root),
        check=True,
    )


def _environment(root: Path, **more: str) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    return found | {"KUBEGRAFT_CACHE": str(root / "cache"), "CUDA_VISIBLE_DEVICES": ""} | more


def _measured(root: Path, plan: dict[str, Any], num_workers: int, name: str) -> tuple[float, float]:
    """Return images a second, and the share of the time that the chief waited."""
    values = plan | {"batch_size": plan["batch_size"] * num_workers}
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(num_workers)]
    cores = sorted(os.sched_getaffinity(0))
    processes = []
    for index in range(num_workers):
        more = dict.fromkeys(_THREADS, "1")
        if num_workers > 1:
            task = {"type": "worker", "index": index}
            more["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        core = str(cores[index % len(cores)])
        with (root / f"{name}-{index}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "benchmarks.scaling",
                        "--work",
                        core,
                        str(root),
                        name,
                        json.dumps(values),
                    ],
                    env=_environment(root, **more),
                    stderr=log,
                )
            )
    codes = [process.wait() for process in processes]
    if any(codes):
        raise click.ClickException(f"A worker failed; see {root}/{name}-*.log (--work-dir keeps it).")
    history = json.loads((root / name / "history.json").read_text())["epochs"]
    num_images = json.loads((root / "dataset" / "manifest.json").read_text())["splits"]["train"]["num_images"]
    speed = num_images * (len(history) - 1) / (history[-1]["seconds"] - history[0]["seconds"])
    return speed, statistics.median(epoch.get("waiting_fraction", 0.0) for epoch in history[1:])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _make_inputs(root: str, data: str) -> None:
    from kubegraft.config import HeadConfig, IngestConfig
    from kubegraft.data.ingest import ingest
    from kubegraft.training.head import train_head

    ingest(Path(root) / "dataset", IngestConfig(source=data))
    train_head(Path(root) / "dataset", Path(root) / "head", HeadConfig(backbone="efficientnet_lite0"))


def _work(core: str, root: str, name: str, plan: str) -> None:
    os.sched_setaffinity(0, {int(core)})  # before TensorFlow counts its processors
    from kubegraft.config import FineTuneConfig
    from kubegraft.training.fine_tune import fine_tune

    config = FineTuneConfig(**json.loads(plan), patience=1000, learning_rate=1e-4)
    fine_tune(Path(root) / "dataset", Path(root) / "head", Path(root) / name, config)
    if "TF_CONFIG" in os.environ:
        time.sleep(1)  # the chief leaves last
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        _make_inputs(*sys.argv[2:])
    elif sys.argv[1:2] == ["--work"]:
        _work(*sys.argv[2:])
    else:
        scaling()
