"""Processes that train together, for tests: a tiny backbone, and what each of them does as told on its command line.

    python -m tests.gang DIRECTORY ACTION...

Actions of the loop alone: `train:NAME` trains a head to the end (from its checkpoint if there is one) and prints its
history and the digest of its weights; `train:NAME:SIGNAL@INDEX` sends itself a signal in its sixth step, if it is
worker INDEX; `train:NAME:CUT@INDEX` waits in that step until the gang's `Lines` are cut.
Actions of the stages: `job:PART` runs a part of a job; `tune:NAME` fine-tunes the job's head by the whole graph.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
INPUT_SIZE = 16
CONFIG = f"""
seed: 2
head: {{backbone: tiny, weights: none, input_size: {INPUT_SIZE}, batch_size: 8, num_epochs: 3, dropout: 0.2}}
fine_tune: {{num_blocks: 1, num_epochs: 2, batch_size: 8, learning_rate: 1e-2, augmentation: flip, patience: 9}}
"""
STEP_OF_SIGNAL = 6


def start(directory, *actions, num_workers=1, num_started=None, lines=None, **environment):
    """Start the processes of a gang; each writes to `<directory>/<index>.out` and `.err`.

    Args:
        lines: `Lines` through which they reach one another; None for directly.
    """
    directory.mkdir(parents=True, exist_ok=True)
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(num_workers)]
    processes = []
    for index in range(num_started or num_workers):
        seen = lines.to_others(addresses, index) if lines else addresses
        task = {"cluster": {"worker": seen}, "task": {"type": "worker", "index": index}}
        own = {
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
            "KUBEGRAFT_TERMINATION_FILE": str(directory / f"{index}.termination"),
            "KUBEGRAFT_LOG_FORMAT": "json",
            "KUBEGRAFT_ENGINE": "keras",  # nothing is timed
            "TF_NUM_INTRAOP_THREADS": "1",
            "TF_NUM_INTEROP_THREADS": "1",
            **({"TF_CONFIG": json.dumps(task)} if num_workers > 1 else {}),
        }
        with (directory / f"{index}.out").open("w") as out, (directory / f"{index}.err").open("w") as err:
            command = [sys.executable, "-m", "tests.gang", str(directory.parent), *actions]
            processes.append(
                subprocess.Popen(command, env=os.environ | own | environment, stdout=out, stderr=err)
            )
    return processes


def finish(processes, seconds=400):
    """Return the exit codes, in the order of the workers; a process that is frozen at the end is killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(p.poll() is None and not _frozen(p.pid) for p in processes):
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
    return [process.wait() for process in processes]


def printed(directory, index=0):
    """Return what worker `index` printed for each name, by name."""
    lines = (directory / f"{index}.out").read_text().splitlines()
    rows = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    return {row["name"]: row for row in rows}


class Lines:
    """What the workers of a gang reach one another through, and a partition of their network.

    Once cut nothing comes through in either direction, and no connection ends: packets are lost, not refused.
    """

    def __init__(self, directory):
        self._request = directory / "cut"
        self._selector = selectors.DefaultSelector()
        self.are_cut = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._forward, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def to_others(self, addresses, index):
        """Return the addresses as worker `index` is to see them."""
        return [
            address if other == index else self._line_to(address) for other, address in enumerate(addresses)
        ]

    def _line_to(self, address):
        server = socket.create_server(("127.0.0.1", 0))
        self._selector.register(server, selectors.EVENT_READ, address)
        return f"127.0.0.1:{server.getsockname()[1]}"

    def _forward(self):
        while not self._closing.is_set():
            if self._request.exists():
                self.are_cut.set()
                self._request.unlink()  # the worker that asked for it goes on now
                self._closing.wait()
                return
            for key, _ in self._selector.select(0.05):
                if isinstance(key.data, str):
                    self._connect(key.fileobj, key.data)
                elif key.fileobj.fileno() >= 0:  # else closed with its other end just now
                    self._pass_on(key.fileobj, key.data)

    def _connect(self, server, address):
        near, _ = server.accept()
        host, port = address.split(":")
        try:
            far = socket.create_connection((host, int(port)))
        except ConnectionRefusedError:  # it has not started yet
            near.close()
            return
        self._selector.register(near, selectors.EVENT_READ, far)
        self._selector.register(far, selectors.EVENT_READ, near)

    def _pass_on(self, source, target):
        try:
            sent = source.recv(1 << 20)
            target.sendall(sent)
        except OSError:
            sent = b""
        if not sent:
            for end in (source, target):
                self._selector.unregister(end)
                end.close()


def _frozen(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def register_tiny_backbone(set_attribute=setattr, set_item=dict.__setitem__):
    """Add the backbone `tiny`, two blocks of one convolution each, to the registry of this process."""
    import keras

    from kubegraft.modeling import backbones
    from kubegraft.modeling.backbone import Backbone

    def tiny(include_top, weights, input_tensor, input_shape):
        rows = input_tensor
        for number, filters in enumerate((6, 8), start=1):
            rows = keras.layers.Conv2D(filters, 3, strides=2, padding="same", name=f"conv_{number}")(rows)
            rows = keras.layers.BatchNormalization(name=f"bn_{number}")(rows)
            rows = keras.layers.ReLU(name=f"relu_{number}")(rows)
        return SimpleNamespace(output=rows)

    set_attribute(keras.applications, "Tiny", tiny, *([False] if set_attribute is not setattr else []))
    tiny_backbone = Backbone(
        name="tiny",
        display_name="Tiny",
        native_input_size=INPUT_SIZE,
        min_input_size=8,
        preprocessing="tf",
        blocks=("relu_1", "relu_2"),
        num_parameters=700,
        license="Apache-2.0",
        source="https://example.invalid",
    )
    set_item(backbones._BY_FOLDED, "tiny", tiny_backbone)


def two_replicas():
    """Cut the processor into two devices, on which everything trains from now on."""
    import tensorflow as tf

    from kubegraft.training import fine_tune, head
    from kubegraft.training.distribution import make_strategy

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    for module in (head, fine_tune):
        module.make_strategy = lambda: make_strategy(["CPU:0", "CPU:1"])


def main(directory, *actions):
    """Do what the actions say, and end with the exit code of the first that fails."""
    from kubegraft import tensorflow_setup
    from kubegraft.errors import KubegraftError
    from kubegraft.processes import catch_stop_signals, watching_for_stop

    faulthandler.register(signal.SIGUSR1)
    register_tiny_backbone()
    catch_stop_signals()
    tensorflow_setup.setup(0)
    code = 0
    kinds = {"replicas": _replicas, "train": _train, "job": _job, "tune": tune}
    try:
        with watching_for_stop():
            for action in actions:
                kind, _, rest = action.partition(":")
                code = code or kinds[kind](directory, rest)
    except KubegraftError as error:
        sys.stdout.write(f"ERROR {error}\n")
        code = error.exit_code
    if "TF_CONFIG" in os.environ and not code:
        time.sleep(1)  # the chief leaves last
    sys.stdout.flush()
    os._exit(code)


def _replicas(*_):
    two_replicas()
    return 0


def _job(directory, part):
    from kubegraft.worker_job import run_part

    return run_part(part, str(directory / "run.yaml"), str(directory / "job"))


def tune(directory, name):
    """Fine-tune the job's head by the whole graph."""
    from kubegraft.config_file import load_run_config
    from kubegraft.training.fine_tune import fine_tune

    config = dataclasses.replace(load_run_config(directory / "run.yaml").fine_tune, num_blocks=2)
    job = directory / "job"
    fine_tune(job / "ingest/dataset", job / "train-head/model", directory / name, config)
    return 0


def _train(directory, rest):
    from kubegraft.training import loop, steps
    from kubegraft.training.distribution import make_strategy
    from kubegraft.training.variables import digest_of_variables
    from tests.unit.test_training_loop import config, examples, head

    name, _, disturbance = rest.partition(":")
    steps.RESIDENT_BYTES = 0  # a call of the graph for each step
    strategy = make_strategy()
    if disturbance:
        _disturb(loop, strategy, disturbance, directory)
    with strategy.scope():
        trainable, model = head()
    history = loop.train(
        strategy, trainable, (examples(), examples()), config(num_epochs=3), directory / f"{name}.ckpt"
    )
    rows = [history.start, *history.epochs]
    _print(name, history=rows, digest=digest_of_variables(model.variables), best=history.best_epoch)
    return 0


def _disturb(loop, strategy, disturbance, directory):
    from kubegraft.training.distribution import workers_of

    name, index = disturbance.split("@")
    if workers_of(strategy).index != int(index):
        return
    told, calls = loop.Pace.told, []

    def and_then(self, *arguments):
        calls.append(1)
        if len(calls) == STEP_OF_SIGNAL and name == "CUT":
            _ask_for_cut(directory / "cut")
        elif len(calls) == STEP_OF_SIGNAL:
            os.kill(os.getpid(), signal.Signals[name])
        return told(self, *arguments)

    loop.Pace.told = and_then


def _ask_for_cut(request):
    request.touch()
    while request.exists():
        time.sleep(0.01)


def _print(name, **values):
    sys.stdout.write(f"RESULT {json.dumps({'name': name, **values})}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
