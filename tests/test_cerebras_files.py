"""Cerebras' checkpoints: cs203.mdl and cs210.mdl were written by the writers of releases 2.0.3 and
2.10.0, cs210_continued.npz by the optimizer of 2.10.0 that loaded the latter and went on."""

import dataclasses
import gzip
import json
from pathlib import Path

import h5py
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cerebras_jax import optim
from cerebras_jax.formats import cerebras, mdl_tree
from cerebras_jax.formats.run import Run

GOLDEN = Path(__file__).parent / "golden"
SAMPLES = ["cs203", "cs210"]
VERSIONS = ["0.4", "0.5"]


@pytest.fixture
def sample(tmp_path):
    def unpacked(name):
        path = tmp_path / f"{name}.mdl"
        path.write_bytes(gzip.decompress((GOLDEN / f"{name}.mdl.gz").read_bytes()))
        return path

    return unpacked


def assert_equal(a, b, path=""):
    """Types, keys in order, dtypes and bits; a list for a set where the format has no sets."""
    if isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert (type(a), len(a)) == (type(b), len(b)), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}.{i}")
    else:
        assert (type(a), a) == (type(b), b), path


def lists_for_sets(tree):
    if isinstance(tree, dict):
        return {k: lists_for_sets(v) for k, v in tree.items()}
    if isinstance(tree, set):
        return sorted(tree)
    return [lists_for_sets(v) for v in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SAMPLES)
def test_read_write_read(sample, tmp_path, name, version):
    tree, left = cerebras.load(sample(name))
    assert left == [{"cs203": "x_set", "cs210": "x_obj"}[name]]  # pickled objects
    cerebras.save(tmp_path / "again.mdl", tree, version)
    again, left = cerebras.load(tmp_path / "again.mdl")
    assert left == []
    assert_equal(lists_for_sets(tree) if version == "0.4" else tree, again)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SAMPLES)
def test_a_run_of_them(sample, tmp_path, name, version):
    run = cerebras.read(sample(name))
    assert run.step == 5
    assert [g["params"] for g in run.groups] == {
        "cs203": [
            ["decoder_dense.weight"],
            ["lowp", "embedding.weight"],
            ["ln.weight", "ln.bias", "decoder_dense.bias"],
        ],
        # `tied` and `embedding.weight` are one parameter; torch counts the first name
        "cs210": [
            ["tied", "decoder_dense.weight", "lowp"],
            ["ln.weight", "ln.bias", "decoder_dense.bias"],
        ],
    }[name]
    assert run.states["lowp"]["exp_avg"].dtype == ml_dtypes.bfloat16
    bias = run.states["ln.bias"]["exp_avg"]  # it began as zeros, and Adam moved it against this
    assert (np.sign(bias) == -np.sign(run.params["ln.bias"])).all()
    cerebras.write(tmp_path / "again.mdl", run, version=version)
    again = cerebras.read(tmp_path / "again.mdl")
    assert_equal(lists_for_sets(run.state_dict()), lists_for_sets(again.state_dict()))
    assert_equal(run.params, again.params)
    assert_equal(lists_for_sets(run.schedulers), lists_for_sets(again.schedulers))
    assert (again.step, list(again.extra)) == (5, list(run.extra))


def test_names_decide(sample):
    order = [n for n in cerebras.read(sample("cs210")).params if n != "tied"]
    run = cerebras.read(sample("cs210"), names=order)
    assert run.groups[0]["params"] == ["embedding.weight", "decoder_dense.weight", "lowp"]


def test_a_run_goes_on_with_the_originals_numbers(sample):
    run = cerebras.read(sample("cs210"))
    params = {n: jnp.asarray(run.params[n]) for n in run.trained}
    opt = optim.AdamW(optim.param_groups(params, run.groups), lr=1.0)
    opt.load_state_dict(run.state_dict())
    theirs = np.load(GOLDEN / "cs210_continued.npz")
    assert opt.param_groups[0]["lr"] == pytest.approx(float(theirs["lr"]))
    for t in range(3):
        grads = {n: jnp.asarray(theirs[f"grads/{t}/{n}"], params[n].dtype) for n in params}
        opt.step(grads)
    for name, value in opt.params.items():
        # in bfloat16 the original rounds the powers of beta, too
        tolerance = 2e-2 if value.dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(
            np.asarray(value, np.float32), theirs[f"params/{name}"], tolerance, tolerance
        )


# --- what a tree may hold ------------------------------------------------------------------------

TREE = {
    "model": {
        "a.b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "low": np.array([1.5, -2], ml_dtypes.bfloat16),
        "half": np.ones((2, 1, 3), np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "flag": np.array([True, False]),
        "count": np.array(7, np.int64),
        "": np.ones(1),
    },
    "names/with": {"x y%": 1, 3: 2.5, "umlaut ü": "text/ü", "none": None, "true": True},
    "lists": [1, [2.0, None, []], (), ({},), {"x"}, -(2**40), float("inf")],
}


@pytest.mark.parametrize("version", VERSIONS)
def test_any_tree(tmp_path, version):
    path = tmp_path / "x.mdl"
    cerebras.save(path, TREE, version)
    assert_equal(lists_for_sets(TREE) if version == "0.4" else TREE, cerebras.load(path)[0])


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
def test_torch_reads_the_tree_specs(tmp_path):
    """The tree of either format is torch's own pytree spec, pickled and as JSON."""
    pytest.importorskip("torch")
    import pickle

    from torch.utils import _pytree

    tree = {"model": {"w": 1, "v": 2}, 3: [4, (5, {})]}
    leaves, _ = _pytree.tree_flatten(tree)
    cerebras.save(tmp_path / "old.mdl", tree, "0.4")
    with h5py.File(tmp_path / "old.mdl") as file:
        old = pickle.loads(bytes.fromhex(file.attrs["__spec__"]))
    cerebras.save(tmp_path / "new.mdl", tree, "0.5")
    with h5py.File(tmp_path / "new.mdl") as file:
        new = _pytree.treespec_loads(json.loads(file.attrs["__spec__"])[1])
    assert _pytree.tree_unflatten(leaves, old) == _pytree.tree_unflatten(leaves, new) == tree


def test_constants_and_links(tmp_path):
    """What the original defers: a constant takes no space; a leaf like an earlier one is a link."""
    path = tmp_path / "x.mdl"
    cerebras.save(path, {"a": np.ones((2, 2), np.float32), "b": 1, "c": 1, "d": 1}, "0.5")
    with h5py.File(path, "r+") as file:
        for key, metadata in [
            ("b", {"__TYPE__": "LinkedObject", "key": "a"}),
            (
                "c",
                {
                    "__TYPE__": "DeferredFullTensor",
                    "shape": [10**6, 10**6],
                    "dtype": "torch.bfloat16",
                    "fill_value": 0.5,
                },
            ),
        ]:
            about = {"__objects__": [key], f"{key}.__metadata__": metadata}
            file.attrs[f"{key}.__metadata__"] = json.dumps(about)
    tree, _ = cerebras.load(path)
    np.testing.assert_array_equal(tree["b"], tree["a"])
    assert (tree["c"].shape, tree["c"].dtype) == ((10**6, 10**6), ml_dtypes.bfloat16)
    assert tree["c"][-1, -1] == 0.5

    cerebras.save(path, {"a": np.ones(3, np.float32), "b": 1, "c": 1}, "0.4")
    with h5py.File(path, "r+") as file:
        file["b"].attrs.update({"__H5_TYPE__": "DeferredFullTensor", "shape": [4], "fill_value": 2})
        link = {"__H5_TYPE__": "DeferredH5Tensor", "link_to_self": True, "key": "a"}
        file["c"].attrs.update(link)
    tree, _ = cerebras.load(path)
    assert (tree["b"].tolist(), tree["c"].tolist()) == ([2] * 4, [1] * 3)


# --- what is refused -----------------------------------------------------------------------------


def edited(tmp_path, version, edit, leaf=None):
    path = tmp_path / "x.mdl"
    leaf = np.arange(8, dtype=np.float32) if leaf is None else leaf
    cerebras.save(path, {"w": leaf, "v": 1}, version)
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def replace_dataset(file, **kwargs):
    attrs = dict(file["w"].attrs)
    del file["w"]
    file.create_dataset("w", **kwargs).attrs.update(attrs)


def external_link(file):
    del file["w"]
    file["w"] = h5py.ExternalLink("other.h5", "/w")


def soft_link(file):
    del file["w"]
    file["w"] = h5py.SoftLink("/v")


def virtual(file):
    attrs = dict(file["w"].attrs)
    del file["w"]
    layout = h5py.VirtualLayout((8,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "w", (8,))
    file.create_virtual_dataset("w", layout).attrs.update(attrs)


def of_kind(kind):
    def edit(file):
        if "__SUCCESS__" in file.attrs:
            metadata = {"__TYPE__": kind, "filepath": "/etc/passwd", "key": "v"}
            about = {"__objects__": ["w"], "w.__metadata__": metadata}
            file.attrs["w.__metadata__"] = json.dumps(about)
        else:
            file["w"].attrs.update({"__H5_TYPE__": kind, "filepath": "/etc/passwd", "key": "w"})

    return edit


REFUSED = [
    ("an external link", external_link, "a link to elsewhere"),
    ("a soft link", soft_link, "a link to elsewhere"),
    ("a missing leaf", lambda f: f.pop("w"), "missing"),
    ("a virtual dataset", virtual, "in another file"),
    (
        "bytes of another file",
        lambda f: replace_dataset(f, shape=(8,), dtype="f4", external=[("/etc/passwd", 0, 32)]),
        "in another file",
    ),
    ("a dataset never written", lambda f: replace_dataset(f, shape=(8,), dtype="f4"), "to its end"),
    (
        "a chunk never written",
        lambda f: (
            replace_dataset(f, shape=(8,), dtype="f4", chunks=(4,)),
            f["w"].write_direct(np.ones(4, np.float32), dest_sel=np.s_[:4]),
        ),
        "to its end",
    ),
    ("a group", lambda f: (f.pop("w"), f.create_group("w")), "not a dataset|missing"),
    ("text", lambda f: replace_dataset(f, data="text"), "no array of numbers"),
    ("another version", lambda f: f.attrs.update({"__version__": 0.9}), "its format is 0.9"),
    ("no tree", lambda f: f.attrs.pop("__spec__"), "__spec__"),
    ("another file's tensor", of_kind("DeferredFileTensor"), "refers to other files|kind"),
    ("a program's tensor", of_kind("DeferredGraphTensor"), "refers to other files|kind"),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("edit", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(tmp_path, version, edit, message):
    path = edited(tmp_path, version, edit)
    with pytest.raises(ValueError, match=rf"x.mdl cannot be read: .*({message})"):
        cerebras.load(path)


def test_a_writer_that_did_not_finish(tmp_path):
    path = edited(tmp_path, "0.5", lambda f: f.attrs.pop("__SUCCESS__"))
    with pytest.raises(ValueError, match="did not finish"):
        cerebras.load(path)


@pytest.mark.parametrize("name", SAMPLES)
def test_cut_files(sample, name):
    path = sample(name)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read"):
            cerebras.load(path)


def test_flipped_bits(sample):
    """Refused, or as harmless as a number that differs: HDF5's old form keeps no checksums."""
    path = sample("cs203")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(whole), 30):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            cerebras.load(path)
        except ValueError:
            refused += 1
    assert refused > 0


def test_objects_of_a_list_become_none(tmp_path):
    path = tmp_path / "x.mdl"
    cerebras.save(path, {"list": [1, 2], "of": (3,)}, "0.5")
    with h5py.File(path, "r+") as file:
        about = {"__objects__": ["list.1"], "list.1.__metadata__": {"__TYPE__": "ObjectSerializer"}}
        file.attrs["list.1.__metadata__"] = json.dumps(about)
    assert cerebras.load(path) == ({"list": [1, None], "of": (3,)}, ["list.1"])


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "x.mdl"
    for tree, error, message in [
        ({"a": object()}, TypeError, "a: a object cannot be written"),
        ({"a.b": 1, "a": {"b": 2}}, ValueError, "several leaves have the path 'a.b'"),
        ({"a": np.array(["x"])}, TypeError, "no arrays of str|cannot hold"),
    ]:
        with pytest.raises(error, match=message):
            cerebras.save(path, tree)
    with pytest.raises(TypeError, match="neither a string nor an int"):
        cerebras.save(path, {(1, 2): 1}, "0.4")
    with pytest.raises(ValueError, match="version must be one of 0.4, 0.5, got '0.6'"):
        cerebras.save(path, {}, "0.6")
    assert list(tmp_path.iterdir()) == []


def test_a_spec_of_another_kind():
    with pytest.raises(ValueError, match="unknown kind os.system"):
        mdl_tree.make_spec("os.system", [], [])


def test_flags_are_kept_from_the_hardware(sample, tmp_path):
    """There, a group's numbers are tensors and its flags integers; our optimizers take both."""
    run = cerebras.read(sample("cs210"))
    groups = [{**g, "amsgrad": np.array(0, np.int32), "eps": np.array(1e-8, np.float32)}
              for g in run.groups]  # fmt: skip
    run = dataclasses.replace(run, groups=groups)
    cerebras.write(tmp_path / "x.mdl", run)
    again = cerebras.read(tmp_path / "x.mdl")
    params = {n: jnp.asarray(again.params[n]) for n in again.trained}
    opt = optim.AdamW(optim.param_groups(params, again.groups), lr=1.0)
    opt.load_state_dict(again.state_dict())
    assert opt.param_groups[0]["lr"] == pytest.approx(0.00914, rel=1e-3)


def test_from_an_optimizer_of_ours(tmp_path):
    params = {"b": jnp.ones(2), "a": jnp.ones((2, 2))}
    opt = optim.AdamW(params, lr=0.1, weight_decay=0.1)
    opt.step(params)
    run = Run.of(dict(opt.named_parameters()), opt.state_dict(), step=1, ordered=False)
    for version in VERSIONS:
        path = tmp_path / f"{version}.mdl"
        cerebras.write(path, run, names=["b", "a"], version=version)
        again = cerebras.read(path)
        assert (again.trained, list(again.params), again.step) == (["b", "a"], ["b", "a"], 1)
        other = optim.AdamW(params, lr=1.0)
        other.load_state_dict(again.state_dict())
        for name, entry in opt.state.items():
            for key, value in entry.items():
                np.testing.assert_array_equal(other.state[name][key], value)
