"""From format to format, and the command that does it."""

import gzip
import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from cerebras_jax.formats import cerebras, convert, huggingface, names, safetensors_file
from cerebras_jax.train.cli import main

GOLDEN = Path(__file__).parent / "golden"
FOLDER = GOLDEN / "hf_tiny"
ORDER = np.load(FOLDER / "expected.npz")["names"].tolist()


@pytest.fixture
def mdl(tmp_path):
    path = tmp_path / "sample.mdl"
    path.write_bytes(gzip.decompress((GOLDEN / "cs210.mdl.gz").read_bytes()))
    return path


def run_command(*args):
    return CliRunner().invoke(main, ["convert", *map(str, args)])


def assert_same_states(a, b):
    assert set(a.states) == set(b.states)
    for name, entry in a.states.items():
        assert set(entry) == set(b.states[name])
        for key, value in entry.items():
            np.testing.assert_array_equal(value, b.states[name][key], err_msg=f"{name} {key}")


def test_through_all_formats(tmp_path):
    """Hugging Face -> 0.4 -> 0.5 -> torch -> Hugging Face: all states come back, bit for bit."""
    pytest.importorskip("torch")
    steps = [tmp_path / "a.mdl", tmp_path / "b.mdl", tmp_path / "c.pt", tmp_path / "checkpoint-2"]
    _, left = convert.convert(FOLDER, steps[0], to="mdl-0.4", source_names=ORDER)
    assert left == ["schedulers", "config", "trainer_state"]
    for source, target in itertools.pairwise(steps):
        assert convert.convert(source, target)[1] == []
    first, last = huggingface.read(FOLDER, ORDER), huggingface.read(steps[-1], ORDER)
    assert_same_states(first, last)
    assert [g["params"] for g in first.groups] == [g["params"] for g in last.groups]
    assert last.step == 2
    for key in ("betas", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay"):
        assert [g[key] for g in first.groups] == [g[key] for g in last.groups]
    np.testing.assert_allclose([g["lr"] for g in last.groups], first.groups[0]["lr"], rtol=1e-7)
    middle = cerebras.read(steps[0])
    assert set(middle.states[ORDER[0]]) == {"exp_avg", "exp_avg_sq", "beta1_power", "beta2_power"}
    assert float(middle.states[ORDER[0]]["beta1_power"]) == pytest.approx(0.9**3)


def test_rules_hold_for_states_and_can_be_undone(tmp_path):
    there, back = tmp_path / "flax.mdl", tmp_path / "torch.mdl"
    convert.convert(FOLDER, there, source_names=ORDER, rules=names.TORCH_TO_FLAX)
    run = cerebras.read(there)
    name = "model.layers.0.mlp.up_proj"
    original = huggingface.read(FOLDER, ORDER)
    assert f"{name}.kernel" in run.params
    np.testing.assert_array_equal(
        run.states[f"{name}.kernel"]["exp_avg"], original.states[f"{name}.weight"]["exp_avg"].T
    )
    assert run.states["model.embed_tokens.embedding"]["exp_avg"].shape == (32, 8)
    reference = tmp_path / "reference.mdl"
    convert.convert(FOLDER, reference, source_names=ORDER)
    convert.convert(there, back, rules=names.TORCH_TO_FLAX, back_to=reference)
    assert_same_states(cerebras.read(reference), cerebras.read(back))
    assert list(cerebras.read(back).params) == ORDER


def test_nothing_is_overwritten(tmp_path, mdl):
    before = mdl.read_bytes()
    with pytest.raises(FileExistsError, match="is there already"):
        convert.convert(FOLDER, mdl, source_names=ORDER)
    assert mdl.read_bytes() == before


def test_names_of_formats(tmp_path):
    for name, form in [
        ("x.pt", "torch"), ("x.bin", "torch"), ("x.mdl", "mdl-0.5"), ("x", "huggingface"),
        ("x.safetensors", "safetensors"),
    ]:  # fmt: skip
        assert convert.format_of_name(tmp_path / name) == form
    with pytest.raises(ValueError, match=r"the ending '.npz' stands for no format"):
        convert.format_of_name("x.npz")
    with pytest.raises(ValueError, match="to must be one of torch, huggingface, .*, got 'x'"):
        convert.convert(FOLDER, tmp_path / "y", to="x")


# --- the command ---------------------------------------------------------------------------------


def test_the_command(tmp_path, mdl):
    result = run_command(mdl, tmp_path / "x.mdl", "--to", "mdl-0.4")
    assert result.exit_code == 0, result.output
    assert "parameters 7, with states 6, groups 2, step 5" in result.output
    assert "Not read, as only its own code could: x_obj" in result.output
    assert result.output.endswith(f"{tmp_path / 'x.mdl'}\n")
    assert_same_states(cerebras.read(mdl), cerebras.read(tmp_path / "x.mdl"))


def test_names_in_files(tmp_path):
    by_name = [n for n in ORDER if "norm" not in n], [n for n in ORDER if "norm" in n]
    for i, text in enumerate(["\n".join(ORDER), "\n\n".join("\n".join(g) for g in by_name)]):
        (tmp_path / "names.txt").write_text(f"{text}\n")
        result = run_command(FOLDER, tmp_path / f"{i}.mdl", "--names", tmp_path / "names.txt")
        assert result.exit_code == 0, result.output
        assert "Left behind, unknown to the target: schedulers, config" in result.output
    assert_same_states(cerebras.read(tmp_path / "0.mdl"), cerebras.read(tmp_path / "1.mdl"))
    result = run_command(FOLDER, tmp_path / "2.mdl")
    assert result.exit_code == 2
    assert "names= must say" in result.output


def test_rules_in_files(tmp_path, mdl):
    rules = tmp_path / "rules.yaml"
    table = [["lowp", "low", ["transpose", {"reshape": [6]}]], ["(.*)", r"model.\1"]]
    rules.write_text(yaml.safe_dump(table))
    result = run_command(mdl, tmp_path / "x.mdl", "--rules", rules)
    assert result.exit_code == 0, result.output
    run = cerebras.read(tmp_path / "x.mdl")
    assert run.states["low"]["exp_avg"].shape == (6,)
    assert "model.ln.bias" in run.params
    result = run_command(tmp_path / "x.mdl", tmp_path / "y.mdl", "--rules", rules, "--back-to", mdl)
    assert result.exit_code == 0, result.output
    assert_same_states(cerebras.read(mdl), cerebras.read(tmp_path / "y.mdl"))
    rules.write_text("lowp: low")
    result = run_command(mdl, tmp_path / "z.mdl", "--rules", rules)
    assert "must be a list of rules, found a dict" in result.output
    rules.write_text("[")
    result = run_command(mdl, tmp_path / "z.mdl", "--rules", rules)
    assert (result.exit_code, "rules.yaml is no YAML" in result.output) == (2, True)
    assert not (tmp_path / "z.mdl").exists()


def test_weights_only(tmp_path, mdl):
    result = run_command(mdl, tmp_path / "x.safetensors")
    assert (result.exit_code, "holds weights only" in result.output) == (2, True)
    assert "--weights-only" in result.output
    result = run_command(mdl, tmp_path / "x.safetensors", "--weights-only")
    assert result.exit_code == 0, result.output
    run, weights = cerebras.read(mdl), safetensors_file.load(tmp_path / "x.safetensors")
    assert set(weights) == set(run.params)
    for name, value in weights.items():
        np.testing.assert_array_equal(value, run.params[name], strict=True)


def test_flax_rules_by_name(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(ORDER))
    target = tmp_path / "x.safetensors"
    result = run_command(FOLDER, target, "--names", tmp_path / "names.txt", "--rules", "flax",
                         "--weights-only")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "lm_head.kernel" in safetensors_file.load(target)


def test_the_module_order_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    result = run_command(FOLDER, tmp_path / "x.mdl", "--module-order")
    assert result.exit_code == 0, result.output
    assert_same_states(huggingface.read(FOLDER, ORDER), convert.read(FOLDER, ORDER))


def test_a_missing_package_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    result = run_command(tmp_path / "model.safetensors", tmp_path / "x.mdl")
    assert result.exit_code == 2
    assert "pip install 'cerebras_jax[convert]'" in result.output
