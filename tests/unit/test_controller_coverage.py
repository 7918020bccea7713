"""The tables of cases reach every branch of what decides."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DECIDES = (
    "reconcile",
    "view",
    "running",
    "ending",
    "failures",
    "conditions",
    "status",
    "job_pods",
    "schedule",
    "ticks",
)
TABLES = ("reconcile", "schedule")


def test_each_branch_of_reconcile_and_schedule_has_its_case(tmp_path):
    data, report = tmp_path / "coverage", tmp_path / "report.json"
    include = ",".join(f"*/kubegraft/controller/{name}.py" for name in DECIDES)
    tables = [f"tests/unit/test_controller_{name}.py" for name in TABLES]
    run = [sys.executable, "-m", "coverage"]
    options = ["--branch", f"--data-file={data}", f"--include={include}"]
    cases = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tables]
    done = subprocess.run(
        [*run, "run", *options, *cases], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    subprocess.run(
        [*run, "json", f"--data-file={data}", "-o", str(report)], cwd=ROOT, check=True, capture_output=True
    )
    files = json.loads(report.read_text())["files"]
    assert len(files) == len(DECIDES)
    missed = {
        Path(name).name: (found["missing_lines"], found["missing_branches"])
        for name, found in files.items()
        if found["missing_lines"] or found["missing_branches"]
    }
    assert missed == {}
