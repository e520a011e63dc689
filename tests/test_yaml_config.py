"""Configurations from YAML: what is refused before anything walks or shows it."""

import itertools
import json

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cerebras_jax import load_recipe
from cerebras_jax.train.cli import main
from cerebras_jax.yaml_config import check_config, read_config

LETTERS = "abcdefghijkl"


def doubled(first, line):
    """A file of a kilobyte in which every line holds the one before nine times."""
    lines = [f"a: &a {first}"]
    for before, name in itertools.pairwise(LETTERS):
        lines.append(f"{name}: &{name} " + line.format(", ".join([f"*{before}"] * 9)))
    return "\n".join(lines)


REFUSED = {
    "a list in itself": ("optimizer: &a [*a]", "holds a value that contains itself"),
    "a mapping in itself": ("a: &a {b: [*a]}", "holds a value that contains itself"),
    "merged into itself": ("a: &a {<<: *a}", "holds a value that contains itself"),
    "aliases": (doubled("[x, x]", "[{}]"), "has more than 100,000 values, aliases written out"),
    "merge keys": (doubled("{x: 1}", "{{<<: [{}]}}"), "has more than 100,000 values"),
    "deep": ("a: " + "[" * 60 + "]" * 60, "has 61 levels, more than 40"),
    "deeper than Python": ("a: " + "[" * 1000, "is nested too deeply"),
    "a great number": ("a: 0x" + "f" * 5000, "has a whole number of 20,000 bits"),
    "too long": ("a: " + "x" * 2**20, "is longer than 1,048,576 bytes"),
    "no YAML": ("a: [", "is not YAML: while parsing"),
    "no text": ("a: \xff", "is not YAML: unacceptable character"),
    "two documents": ("a: 1\n---\nb: 2", "is not YAML: expected a single document"),
    "code": ("a: !!python/object/apply:os.getcwd []", "is not YAML: could not determine"),
    "no date": ("a: 2024-99-99", "a value that is not what it claims: ValueError: month"),
    "no flag": ("a: !!bool x", "a value that is not what it claims: KeyError"),
    "no mapping": ("- a", "must be a YAML mapping, got list"),
    "nothing": ("", "must be a YAML mapping, got NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(tmp_path, name):
    text, message = REFUSED[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_config(path)
    for command in (["train", str(path), "--out", str(tmp_path / "run")], ["schedule", str(path)]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        line = result.stderr.removesuffix("\n")
        assert line.startswith(f"Error: {path} ")
        assert line.isprintable()
        assert len(line) < 500
    assert not (tmp_path / "run").exists()


def test_aliases_and_merge_keys_of_ordinary_size(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("base: &b {lr: 1.0e-3}\noptimizer: {<<: *b, optimizer_type: SGD}\nagain: *b\n")
    assert read_config(path) == {
        "base": {"lr": 0.001},
        "optimizer": {"lr": 0.001, "optimizer_type": "SGD"},
        "again": {"lr": 0.001},
    }


def test_mappings_are_checked_too():
    endless: dict = {"optimizer_type": "SGD"}
    endless["betas"] = [endless]
    with pytest.raises((TypeError, ValueError), match="optimizer must be nested at most 32 deep"):
        load_recipe({"optimizer": endless})
    with pytest.raises(ValueError, match="a whole number of 65 bits"):
        check_config({"seed": 2**64})
    check_config({"seed": 2**64 - 1, "arrays": np.ones((3, 3)), "text": "x" * 10**6})
    with pytest.raises(TypeError, match="a path or a dict, got int"):
        read_config(3)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=3), plain, max_size=4))
def test_what_yaml_writes_is_read_back(tmp_path_factory, config):
    """Oracle: PyYAML's own round trip."""
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    assert json.dumps(read_config(path)) == json.dumps(config)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 3}\noptimizer:\n  lr: 0.1\n  lr: 0.2\n")
    with pytest.raises(ValueError, match="has the key 'lr' again at line 4"):
        read_config(path)
    path.write_text(
        "base: &b {lr: 0.1}\nmore: &m {eps: 1.0}\nall:\n  <<: *b\n  <<: *m\n  lr: 0.2\n"
    )
    assert read_config(path)["all"] == {"lr": 0.2, "eps": 1.0}
