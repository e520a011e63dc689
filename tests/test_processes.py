"""Two processes that train together, their checkpoint, and what must not differ between them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("run_processes.py")


def run(count, folder, what):
    """What each of ``count`` processes printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = f"--xla_force_host_platform_device_count={4 // count}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), what, str(folder), port, str(i), str(count)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    for out, errors in outputs:
        assert out.endswith("done\n"), errors[-3000:]
    return [out for out, _ in outputs]


def results(output):
    """What was restored or saved, and what came of training on."""
    return [line for line in output.splitlines() if line.startswith(("restored", "result"))]


def test_two_processes_train_save_and_are_resumed_by_two_and_by_one(tmp_path):
    first, second = run(2, tmp_path, "train")
    assert results(first) == results(second)
    assert len(results(first)) == 2
    again = run(2, tmp_path, "resume")
    assert [results(output) for output in again] == [results(first)] * 2
    (alone,) = run(1, tmp_path, "resume")
    assert results(alone) == results(first)


def test_numbers_that_differ_between_processes_are_refused(tmp_path):
    for output in run(2, tmp_path, "differ"):
        refused = [line for line in output.splitlines() if line.startswith("refused")]
        assert [line.split()[1] for line in refused] == ["check", "save", "construct", "load"]
        assert all("processes [1] hold other numbers than process 0" in line for line in refused)
