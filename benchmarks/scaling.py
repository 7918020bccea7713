"""`python -m benchmarks.scaling DATA`: two workers on a core each against one worker on one core.

All run the stage `fine_tune` itself, on one dataset and model and with as many images a worker and step; each process
is bound to one core and one thread before TensorFlow is loaded. What is compared is whole epochs, validation and
checkpoints included, without the first, which compiles. Rounds alternate, so that a busy machine slows both. Two
workers that know nothing of one another show what the machine itself gives to a second one.
"""

from __future__ import annotations

import itertools
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
@click.option(
    "--batch-size",
    type=int,
    help="Images of a step for each worker.  [default: near 32, with the fewest places left empty in the last step]",
)
@click.option("--epochs", default=3, show_default=True, help="Epochs, of which the first is not counted.")
@click.option("--rounds", default=3, show_default=True, help="How often each is measured.")
@click.option(
    "--work-dir", type=click.Path(path_type=Path), help="Where to work.  [default: a temporary directory]"
)
def scaling(
    data: Path,
    num_blocks: int,
    batch_size: int | None,
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
            "batch_size": batch_size or _even_batch_size(_num_images(root)),
            "augmentation": "none",
        }
        print(f"{plan['batch_size']} images a worker and step, last {num_blocks} blocks train; images/s:")
        print(
            f"{'round':>5} {'1 worker':>10} {'2 apart':>10} {'2 workers':>10} {'ratio':>6} {'waiting':>8}",
            flush=True,
        )
        ratios = []
        for number in range(rounds):
            one, _ = _measured(root, plan, 1, [f"{number}-one"])
            apart, _ = _measured(root, plan, 1, [f"{number}-left", f"{number}-right"])
            two, waiting = _measured(root, plan, 2, [f"{number}-two"])
            ratios.append(two / one)
            print(
                f"{number:5} {one:10.1f} {apart:10.1f} {two:10.1f} {ratios[-1]:6.2f} {waiting:8.1%}",
                flush=True,
            )
        print(f"median ratio {statistics.median(ratios):.2f}")


def _even_batch_size(num_images: int) -> int:
    """Return how many images of a step leave one worker and two the fewest empty places in an epoch's last step."""
    return min(range(24, 41), key=lambda size: (-num_images % (2 * size), abs(size - 32)))


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


def _measured(root: Path, plan: dict[str, Any], num_workers: int, names: list[str]) -> tuple[float, float]:
    """Return images a second of all trainings that run at once, and the median share that a chief waited.

    Args:
        root: Where `_prepare` put what they share.
        plan: What they do, with the images of a step for each worker.
        num_workers: Workers of each training.
        names: Name of each training.
    """
    values = json.dumps(plan | {"batch_size": plan["batch_size"] * num_workers})
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
    processes = []
    for name in names:
        addresses = [f"127.0.0.1:{port}" for port in _free_ports(num_workers)]
        for index in range(num_workers):
            more = dict.fromkeys(_THREADS, "1")
            if num_workers > 1:
                task = {"type": "worker", "index": index}
                more["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
            command = ["--work", str(next(cores)), str(root), name, values]
            with (root / f"{name}-{index}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "benchmarks.scaling", *command],
                        env=_environment(root, **more),
                        stderr=log,
                    )
                )
    codes = [process.wait() for process in processes]
    if any(codes):
        raise click.ClickException(f"A worker failed; see {root}/{names[0]}-*.log (--work-dir keeps it).")
    histories = [json.loads((root / name / "history.json").read_text())["epochs"] for name in names]
    speed = sum(
        _num_images(root) * (len(epochs) - 1) / (epochs[-1]["seconds"] - epochs[0]["seconds"])
        for epochs in histories
    )
    waiting = (epoch.get("waiting_fraction", 0.0) for epochs in histories for epoch in epochs[1:])
    return speed, statistics.median(waiting)


def _num_images(root: Path) -> int:
    manifest = json.loads((root / "dataset" / "manifest.json").read_text())
    return int(manifest["splits"]["train"]["num_images"])


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
