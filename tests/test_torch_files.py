"""Torch files against torch itself: torch.save's files in, torch.load reads ours."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from cerebras_jax import optim, schedules
from cerebras_jax.formats import convert, dialects, names, pt
from cerebras_jax.formats.run import Run

torch = pytest.importorskip("torch")


def assert_same(array, tensor):
    assert isinstance(array, np.ndarray)
    assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.detach()
    if array.dtype.kind not in "biufc" or array.dtype.name.startswith("float8"):
        tensor, array = tensor.float(), array.astype(np.float32)
    np.testing.assert_array_equal(array, tensor.numpy(), strict=True)


DTYPES = [
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
    "uint16", "uint32", "uint64", "bool", "complex64", "complex128", "float8_e4m3fn",
    "float8_e5m2",
]  # fmt: skip


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors(tmp_path, dtype, new):
    values = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 6.0]]).to(getattr(torch, dtype))
    tensors = {
        "plain": values,
        "transposed": values.T,
        "strided": values[:, ::2],
        "offset": values[1],
        "scalar": values[1, 2],
        "empty": values[:0],
        "broadcast": values[:1].expand(4, 3),
    }
    if values.dtype.is_floating_point or values.dtype.is_complex:
        tensors["parameter"] = torch.nn.Parameter(values)
    path = tmp_path / "x.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=new)
    tree, left = pt.load(path)
    assert (list(tree), left) == (list(tensors), [])
    for name, tensor in tensors.items():
        assert_same(tree[name], tensor)
    pt.save(path, tree)
    for name, tensor in torch.load(path).items():
        assert_same(tree[name], tensor)


def test_what_is_no_data_is_left_out(tmp_path):
    path = tmp_path / "x.pt"
    things = {
        "size": torch.Size([2, 3]), "device": torch.device("cpu"), "dtype": torch.float32,
        "set": {1}, "list": [1, torch.nn.Linear(1, 1), 3], "sparse": torch.eye(2).to_sparse(),
        "subclass": torch.nn.Buffer(torch.ones(2)), "number": np.float64(0.5),
    }  # fmt: skip
    torch.save(things, path)
    tree, left = pt.load(path)
    assert left == ["dtype", "list.1", "sparse"]
    assert tree["list"] == [1, None, 3]
    assert (tree["size"], tree["device"], tree["set"], tree["number"]) == ((2, 3), "cpu", {1}, 0.5)
    np.testing.assert_array_equal(tree["subclass"], np.ones(2))


# --- optimizers ----------------------------------------------------------------------------------

OPTIMIZERS = [
    ("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {}), ("Adamax", {}), ("NAdam", {}), ("RAdam", {}), ("Adagrad", {"lr_decay": 0.1}),
    ("Adadelta", {}), ("RMSprop", {"momentum": 0.9, "centered": True}), ("Rprop", {}),
    ("ASGD", {"t0": 2}), ("Adafactor", {}),
]  # fmt: skip
GO_ON = [
    ("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("Adamax", {}), ("NAdam", {}), ("ASGD", {"t0": 2}),
]  # fmt: skip


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))


def train(module, optimizer, steps, start=0):
    for t in range(start, start + steps):
        x = torch.tensor(np.random.default_rng(t).normal(size=(8, 3)), dtype=torch.float32)
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def gradients(module, steps, start):
    """The gradients of a run that goes on in torch, by name, while it goes on."""
    optimizer = module.optimizer
    for t in range(start, start + steps):
        x = torch.tensor(np.random.default_rng(t).normal(size=(8, 3)), dtype=torch.float32)
        optimizer.zero_grad()
        module(x).square().mean().backward()
        yield {n: jnp.asarray(p.grad.numpy()) for n, p in module.named_parameters()}
        optimizer.step()


def saved(tmp_path, name, kwargs, parameters=None):
    module = net()
    optimizer = getattr(torch.optim, name)(parameters(module) if parameters else
                                           module.parameters(), lr=0.01, **kwargs)  # fmt: skip
    train(module, optimizer, 5)
    path = tmp_path / "checkpoint.pt"
    states = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**states, "global_step": 5, "best": 0.25}, path)
    module.optimizer = optimizer
    return module, path


@pytest.mark.parametrize(("name", "kwargs"), OPTIMIZERS, ids=str)
def test_there_and_back_is_equal_bit_for_bit(tmp_path, name, kwargs):
    module, path = saved(tmp_path, name, kwargs)
    run = pt.read(path)
    assert run.trained == [n for n, _ in module.named_parameters()]
    assert (run.step, run.extra) == (5, {"best": 0.25})
    pt.write(tmp_path / "again.pt", run)
    first, again = (torch.load(p) for p in (path, tmp_path / "again.pt"))
    assert list(again) == list(first)
    for group in again["optimizer"]["param_groups"]:
        assert group.pop("param_names") == run.trained
    assert again["optimizer"]["param_groups"] == first["optimizer"]["param_groups"]
    for number, entry in first["optimizer"]["state"].items():
        other = again["optimizer"]["state"][number]
        assert list(other) == list(entry)
        for key, value in entry.items():
            assert value is other[key] is None or torch.equal(value, other[key]), key
    for key, value in first["model"].items():
        assert torch.equal(value, again["model"][key])
    returned = getattr(torch.optim, name)(net().parameters(), lr=0.5, **kwargs)
    returned.load_state_dict(again["optimizer"])


@pytest.mark.parametrize(("name", "kwargs"), GO_ON, ids=str)
def test_a_run_goes_on_with_the_same_numbers(tmp_path, name, kwargs):
    """Six steps after reading: SGD bit for bit, with momentum to a unit in the last place (XLA
    multiplies and adds at once), the others to rounding.

    Adafactor's formula differs from torch's; see the table of deviations.
    """
    module, path = saved(tmp_path, name, kwargs)
    run = pt.read(path)
    params = {n: jnp.asarray(run.params[n]) for n in run.trained}
    opt = getattr(optim, name)(params, lr=1.0, **kwargs)
    opt.load_state_dict(run.state_dict())
    if name in ("Adam", "AdamW"):
        opt.param_groups[0]["eps"] = schedules.torch_eps()
    for grads in gradients(module, 6, 5):
        opt.step(grads)
    for key, value in module.named_parameters():
        value = value.detach().numpy()
        if name == "SGD":
            most = 1 if kwargs else 0
            np.testing.assert_array_max_ulp(np.asarray(opt.params[key]), value, most)
        else:
            np.testing.assert_allclose(opt.params[key], value, rtol=1e-6, atol=1e-6, err_msg=key)


def test_two_groups(tmp_path):
    """Named by shape and decay; what is written names them."""

    def groups(module):
        vectors = [p for p in module.parameters() if p.ndim < 2]
        matrices = [p for p in module.parameters() if p.ndim == 2]
        return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]

    module, path = saved(tmp_path, "AdamW", {}, groups)
    run = pt.read(path)
    assert [g["params"] for g in run.groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "1.weight", "1.bias", "2.bias"],
    ]
    params = {n: jnp.asarray(p) for n, p in run.params.items()}
    opt = optim.AdamW(optim.param_groups(params, run.groups), lr=1.0)
    opt.load_state_dict(run.state_dict())
    for group in opt.param_groups:
        group["eps"] = schedules.torch_eps()
    for grads in gradients(module, 3, 5):
        opt.step(grads)
    for key, value in module.named_parameters():
        np.testing.assert_allclose(opt.params[key], value.detach().numpy(), rtol=1e-6, atol=1e-6)


def test_from_an_optimizer_of_ours_to_torch(tmp_path):
    """The way back: the same gradients, first here, then there, against torch all the way."""
    module = net()
    module.optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
    params = {n: jnp.array(p.detach().numpy()) for n, p in module.named_parameters()}
    opt = optim.AdamW(params, lr=0.01, weight_decay=0.1, eps=schedules.torch_eps())
    for grads in gradients(module, 4, 0):
        opt.step(grads)
    run = Run.of(dict(opt.named_parameters()), opt.state_dict(), step=4, ordered=False)
    with pytest.raises(ValueError, match="names= must list them in the model's order"):
        pt.write(tmp_path / "x.pt", run)
    pt.write(tmp_path / "x.pt", run, names=[n for n, _ in module.named_parameters()])
    file = torch.load(tmp_path / "x.pt")
    other = net()
    other.load_state_dict(file["model"])
    optimizer = torch.optim.AdamW(other.parameters(), lr=1.0)
    optimizer.load_state_dict(file["optimizer"])
    assert file["global_step"] == 4
    assert optimizer.param_groups[0]["eps"] == 1e-8
    train(module, module.optimizer, 3, start=4)
    train(other, optimizer, 3, start=4)
    for mine, theirs in zip(other.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_parts_and_other_layouts(tmp_path):
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    train(module, optimizer, 2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    path = tmp_path / "x.pt"
    names = [n for n, _ in module.named_parameters()]
    for tree, expected in [
        (module.state_dict(), (names, [], None)),
        (optimizer.state_dict(), ([], list("012345"), None)),
        (scheduler.state_dict(), ([], [], 0)),
        (
            {  # Lightning
                "state_dict": module.state_dict(),
                "optimizer_states": [optimizer.state_dict()],
                "lr_schedulers": [scheduler.state_dict()],
                "global_step": 2,
                "hyper": {"x": 1},
            },
            (names, names, 2),
        ),
    ]:
        torch.save(tree, path)
        run = pt.read(path)
        assert (list(run.params), run.trained, run.step) == expected
        pt.write(tmp_path / "y.pt", run)
        again = pt.read(tmp_path / "y.pt")
        assert (list(again.params), again.trained) == expected[:2]
    for tree, message in [
        ([1], "holds a list, no state dict"),
        ({"x": 1}, r"neither a model nor an optimizer, but \['x'\]"),
        ({"model": [], "optimizer": optimizer.state_dict()}, "the model is a list"),
        ({"optimizer_states": [optimizer.state_dict()] * 2}, "has 2 optimizers, expected 1"),
    ]:
        torch.save(tree, path)
        with pytest.raises(ValueError, match=message):
            pt.read(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    pt.write(path, Run({"w": np.ones(2)}))
    before = path.read_bytes()
    with pytest.raises(TypeError, match="torch has no dtype datetime64"):
        pt.write(path, Run({"w": np.array(["2020"], "datetime64[Y]")}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_large_arrays_are_not_copied(tmp_path):
    """Memory beside the file's own, on the way from one format to the next."""
    large = {f"l.{i}.weight": torch.full((256, 1024), i + 0.5) for i in range(8)}
    size = sum(t.nbytes for t in large.values())
    torch.save(large, tmp_path / "a.pt")
    convert.convert(tmp_path / "a.pt", tmp_path / "first.mdl")  # imports
    for source, target, rules, most in [
        ("a.pt", "b.pt", (), 0.05),
        ("a.pt", "c.mdl", (), 0.05),
        ("a.pt", "d.mdl", names.TORCH_TO_FLAX, 0.3),  # one transposed at a time, as one block
        ("c.mdl", "e.pt", (), 1.1),
    ]:
        tracemalloc.start()
        convert.convert(tmp_path / source, tmp_path / target, rules=rules)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most * size, (source, target, peak / size)
    again = torch.load(tmp_path / "e.pt")
    assert all(torch.equal(again[name], value) for name, value in large.items())


# --- torch's words and Cerebras' -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adafactor"])
def test_words_change_there_and_back(tmp_path, name):
    """torch -> Cerebras -> torch: all of torch's states and values are there again."""
    _, path = saved(tmp_path, name, {})
    run = pt.read(path)
    theirs = dialects.to_cerebras(run)
    back = dialects.to_torch(theirs)
    for parameter, entry in run.states.items():
        assert set(back.states[parameter]) == set(entry)
        for key, value in entry.items():
            np.testing.assert_array_equal(back.states[parameter][key], value)
    for key in {"lr", "betas", "weight_decay"} & set(run.groups[0]):
        np.testing.assert_allclose(back.groups[0][key], run.groups[0][key], rtol=1e-7, atol=0)
    opt = getattr(optim, name)(dict(run.params), lr=1.0)
    opt.load_state_dict(theirs.state_dict())  # our optimizers take either
    other = getattr(optim, name)(dict(run.params), lr=1.0)
    other.load_state_dict(run.state_dict())
    for parameter, entry in opt.state.items():
        for key, value in entry.items():
            np.testing.assert_allclose(value, other.state[parameter][key], rtol=1e-6)
