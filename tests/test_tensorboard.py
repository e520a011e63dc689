"""The metrics of a training run as TensorBoard's events, read back."""

import json
import struct
import sys

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from cerebras_jax.train.cli import main

pytestmark = pytest.mark.usefixtures("one_device")

CONFIG = {
    "optimizer": {
        "optimizer_type": "SGD",
        "learning_rate": 0.01,
        "loss_scaling_factor": "dynamic",
        "max_gradient_norm": 1.0,
    },
    "train": {
        **{"steps": 3, "batch_size": 2, "context": 8, "layers": 1, "width": 8, "heads": 2},
        **{"eval_every": 2, "save_every": 2},
    },
}


def invoke(tmp_path, *arguments):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    text = str(tmp_path / "text.txt")
    return CliRunner().invoke(main, ["train", "--data", text, "--tensorboard", *arguments])


def read_events(path):
    """The events of a file, which are length, checksum, message, checksum, again and again."""
    from tensorboardX.proto.event_pb2 import Event

    data, at = path.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + size])
        at += size + 16


def scalars(folder):
    """Values by name and step; later files, in the order of their times, drop what they redo."""
    found = {}
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        for event in read_events(path):
            if event.HasField("session_log"):
                found = {k: v for k, v in found.items() if k[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_events_are_the_metrics_also_of_a_resumed_run(tmp_path):
    pytest.importorskip("tensorboardX")
    out = tmp_path / "run"
    result = invoke(tmp_path, str(tmp_path / "config.yaml"), "--out", str(out))
    assert result.exit_code == 0, result.output
    result = invoke(tmp_path, "--resume", str(out), "--steps", "5")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    expected = {
        (name, line["step"]): np.float32(value)
        for line in lines
        for name, value in line.items()
        if name not in ("step", "seconds")
    }
    assert scalars(out / "tensorboard") == expected
    steps = {name: [s for n, s in expected if n == name] for name, _ in expected}
    for name in ("loss", "lr", "gradient_norm", "loss_scale"):
        assert steps[name] == [0, 1, 2, 3, 4]


def test_without_tensorboardx_there_is_one_line_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    result = invoke(tmp_path, str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert "pip install 'cerebras_jax[tensorboard]'" in result.output
    assert not (tmp_path / "run").exists()
