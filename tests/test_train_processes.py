"""The training command in two processes, one of which comes to harm."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import cerebras_jax as cjax

SCRIPT = Path(__file__).with_name("run_training.py")
PATIENCE = 6
CONFIG = {
    "optimizer": {"optimizer_type": "SGD", "momentum": 0.9, "learning_rate": 0.1},
    "train": {
        **{"steps": 4, "batch_size": 4, "context": 8, "layers": 1, "width": 8, "heads": 2},
        **{"eval_every": 100, "save_every": 2},
    },
}


@pytest.fixture
def base(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def run(base, count, *arguments, harm="none", stopped=None):
    """Exit codes and outputs of ``count`` processes, with two devices in all.

    Sums of two numbers have no order, so results are the same to the last bit.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={2 // count}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SCRIPT), harm, "train", "--data", "text.txt", *arguments]
    started = []
    for i in range(count):
        options = ["--distributed", "--processes", str(count), "--patience", str(PATIENCE)]
        options += ["--coordinator", f"127.0.0.1:{port}", "--process-id", str(i)]
        started.append(
            subprocess.Popen(
                [*command, *(options if count > 1 else [])],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                cwd=base,
            )
        )
    try:
        outputs = [
            "" if i == stopped else process.communicate(timeout=240)[0]
            for i, process in enumerate(started)
        ]
        return [process.poll() for process in started], outputs
    finally:
        for process in started:
            process.kill()
            process.communicate()


def results(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    losses = [(r["step"], r["loss"]) for r in lines if "loss" in r]
    contents = cjax.inspect(out / "checkpoints" / "4")
    return losses, contents.fingerprints


def test_a_process_is_gone_in_a_save_and_the_run_goes_on(base):
    """It falls silent, as when its machine is gone: one that merely dies closes its sockets."""
    begun = ["config.yaml", "--out", "run"]
    codes, outputs = run(base, 2, *begun, harm="SIGSTOP at save4 in 1", stopped=1)
    assert codes[0] == 1, outputs[0]
    assert outputs[0].splitlines()[-1] == (
        f"Error: process 1 said nothing for {PATIENCE} s; --resume goes on from the latest "
        "checkpoint"
    )
    shutil.copytree(base / "run", base / "twin")
    for out, count in (("run", 2), ("twin", 1)):
        codes, outputs = run(base, count, "--resume", out)
        assert codes == [0] * count, outputs
        assert "resumed after 2 steps" in outputs[0]
        assert all("step" not in text for text in outputs[1:])  # process 0 tells it all
    assert results(base / "run") == results(base / "twin")
    ours, theirs = (dict(np.load(base / name / "weights.npz")) for name in ("run", "twin"))
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


def test_the_error_of_one_process_ends_the_other(base):
    begun = ["config.yaml", "--out", "run"]
    codes, outputs = run(base, 2, *begun, harm="OSError at step3 in 1")
    assert codes == [1, 1], outputs
    assert outputs[1].splitlines()[-1] == "Error: no disk"
    last = outputs[0].splitlines()[-1]
    assert last.startswith("Error: process 1 ended: no disk; --resume") or "Gloo" in last
