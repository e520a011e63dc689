"""Files that lost bits, ends, or altogether: refused or harmless, never other numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from run_damage import content, files, make, outcome, save

import cerebras_jax as cjax


def test_no_damage_gives_other_numbers(tmp_path):
    """30 flipped bits, every file cut and deleted; afterwards all is well again."""
    script = Path(__file__).with_name("run_damage.py")
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), str(tmp_path / "x")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    flipped, cut, intact = json.loads(done.stdout.splitlines()[-1])
    assert set(flipped) == set(cut) == {"same", "refused"}
    assert sum(flipped.values()) == 30
    assert intact == {"same": 1}


def test_every_bit_of_a_value_counts(tmp_path):
    """Also where orbax itself finds nothing."""
    path = tmp_path / "x"
    save(path)
    expected = content(path)
    target = np.float32(jax.device_get(make()["opt"].params["w"]))
    largest = max(files(path), key=lambda f: f.stat().st_size)
    intact = largest.read_bytes()
    value = cjax.restore(path, opt={"params": {"w": target}}, extra="ignore")["opt"]["params"]["w"]
    start = intact.find(value.tobytes())
    assert start >= 0  # stored as they are
    for place in (0, value.nbytes // 2, value.nbytes - 1):
        broken = bytearray(intact)
        broken[start + place] ^= 1
        largest.write_bytes(broken)
        with pytest.raises(cjax.DamagedError, match="'opt/params/w'. are not what was saved"):
            content(path)
        with pytest.raises(cjax.DamagedError):
            cjax.inspect(path, verify=True)
        like = {"params": {"w": target}}
        unverified = cjax.restore(path, opt=like, extra="ignore", verify=False)["opt"]["params"]
        assert unverified["w"].tobytes() != value.tobytes()
    largest.write_bytes(intact)
    assert outcome(path, expected) == "same"


def test_an_older_one_is_named(tmp_path):
    with cjax.Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, x=np.arange(1000.0) * step)
    largest = max(files(tmp_path / "2"), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    with cjax.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(cjax.DamagedError, match=r"restore\(step=1\) takes an older one"):
            checkpoints.restore(x=np.zeros(1000))
        found = checkpoints.restore(step=1, x=np.zeros(1000))
        assert found["x"][-1] == 999
