import http.server
import json
import socket
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner

from kubegraft import doctor
from kubegraft.cli import main
from kubegraft.doctor import Check
from kubegraft.machine_limits import memory_limit_bytes


def rows(check):
    return {row.name: row for row in check}


@pytest.mark.parametrize(
    ("version", "rule", "expected"),
    [
        ("2.21.0", ">=2.21,<2.22", True),
        ("2.22.0", ">=2.21,<2.22", False),
        ("2.20.9", ">=2.21,<2.22", False),
        ("11.0", ">=11", True),
        ("10.9", ">=11", False),
        ("8.1", ">=8.1", True),
        ("2.21.0+cpu", ">=2.21,<2.22", True),
        ("0.1.0", "==0.1.0", True),
        ("0.1.1", "==0.1.0", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version, rule, expected):
    assert doctor.satisfies(version, rule) is expected


def test_every_package_of_this_installation_is_there():
    found = rows(doctor.check_packages())
    assert {"click", "numpy", "tensorflow-cpu", "keras", "kfp"} <= set(found)
    assert "pytest" not in found
    assert [row for row in found.values() if row.status == "fail"] == []


def test_missing_packages_fail_unless_they_are_for_one_kind_of_uri():
    assert doctor._check_package("no-such-package", ">=1", "kubegraft[train]").status == "fail"
    assert "kubegraft[train]" in doctor._check_package("no-such-package", ">=1", "kubegraft[train]").advice
    assert doctor._check_package("click", ">=999", "kubegraft").status == "warn"


@pytest.mark.parametrize(
    ("files", "processors", "memory"),
    [
        ({"cpu.max": "150000 100000\n", "memory.max": "2147483648\n"}, 1.5, 2**31),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, None, None),
        (
            {
                "cpu/cpu.cfs_quota_us": "50000\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": "1073741824\n",
            },
            0.5,
            2**30,
        ),
        (
            {
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            None,
            None,
        ),
        ({}, None, None),
    ],
    ids=["v2", "v2 without limits", "v1", "v1 without limits", "no cgroup"],
)
def test_limits_of_a_container(tmp_path, files, processors, memory):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert doctor.cpu_limit(tmp_path) == processors
    assert memory_limit_bytes(tmp_path) == memory


def test_processor_flags(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu avx avx2\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert doctor.cpu_features(path) == {"fpu", "avx", "avx2"}
    path.write_text("Features\t: fp asimd\n")
    assert doctor.cpu_features(path) is None
    assert doctor.cpu_features(tmp_path / "missing") is None


@pytest.fixture
def server():
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}/"
        listening.shutdown()
        thread.join()


def test_any_answer_means_that_the_network_is_there(server):
    assert rows(doctor.check_network(server))["network"].status == "ok"


def test_no_answer_is_a_warning_with_a_way_out():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        row = rows(doctor.check_network(f"http://127.0.0.1:{taken.getsockname()[1]}/"))["network"]
    assert row.status == "warn"
    assert "--weights" in row.advice


def test_kubernetes_is_optional(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert rows(doctor.check_kubernetes())["kubernetes"].status == "ok"
    (tmp_path / "config").touch()
    assert rows(doctor.check_kubernetes())["kubernetes"].found == str(tmp_path / "config")


def test_this_machine_is_able():
    done = subprocess.run(
        [sys.executable, "-m", "kubegraft", "doctor", "--json"], capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout)
    assert document["ok"] is True
    names = {row["name"] for row in document["checks"]}
    assert {"python", "processors", "memory", "devices", "disk here", "weights", "network"} <= names


def test_what_is_missing_is_said_with_its_remedy_and_exit_code_9(monkeypatch):
    checks = [Check("python", "ok", "3.13"), Check("kfp", "fail", "not installed", "pip install it")]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 9
    assert result.stdout.splitlines() == [
        "ok    python  3.13",
        "fail  kfp     not installed",
        "              -> pip install it",
    ]
