"""Runs gpu_tests.py in a process of its own, because its pretend GPU would stay in this one."""

import os
import subprocess
import sys
from pathlib import Path


def test_everything_runs_on_a_pretend_gpu_and_in_half_precision():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", str(Path(__file__).with_name("gpu_tests.py"))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-5000:]
