"""The stateful shell: groups, steps, state dicts, display, copies, modules."""

import copy
import inspect
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optimizers import OPTIMIZERS, one_each

from cerebras_jax import optim, schedules

PARAMS = {
    "dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)},
    "scale": jnp.array(2.0, jnp.float32),
}
GRADS = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)

every = pytest.mark.parametrize("entry", OPTIMIZERS, ids=repr)
one = pytest.mark.parametrize("entry", one_each(0), ids=repr)
other = pytest.mark.parametrize("entry", one_each(1), ids=repr)


def make(entry, params=PARAMS, **kwargs):
    return entry.cls(params, **entry.kwargs, **kwargs)


def snapshot(opt):
    return jax.tree.map(np.array, (opt.params, {k: dict(v) for k, v in opt.state.items()}))


# --- one step -------------------------------------------------------------------------------------


@other
def test_forms_of_step_agree(entry):
    by_grads, by_closure = make(entry), make(entry)
    for _ in range(3):
        assert by_grads.step(GRADS) is None
        loss = by_closure.step(lambda p: sum((x * 0.5).sum() for x in jax.tree.leaves(p)))
    assert loss.shape == ()
    chex.assert_trees_all_close(snapshot(by_grads), snapshot(by_closure), rtol=2e-6, atol=1e-7)


@every
def test_one_compilation_for_all_learning_rates(entry, compilations):
    opt = make(entry)
    opt.step(GRADS)
    opt.step(GRADS)
    with compilations(0):
        for lr in np.linspace(0.0, 0.2, 10):
            opt.param_groups[0]["lr"] = float(lr)
            opt.step(GRADS)
        opt.param_groups[0]["lr"] = np.float32(0.1)
        opt.step(GRADS)


@every
def test_no_state_is_created_in_a_step(entry):
    opt = make(entry)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), opt.parts().arrays)
    opt.step(GRADS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), opt.parts().arrays) == before


@every
def test_arrays_of_the_caller_stay_valid(entry):
    params = jax.tree.map(jnp.copy, PARAMS)
    opt = make(entry, params)
    kept = [params, opt.params, opt.state_dict(), opt.state]
    for _ in range(2):
        opt.step(GRADS)
        opt.step(lambda p: p["scale"] ** 2)
        kept += [opt.params, opt.state_dict()]
    jax.block_until_ready(jax.tree.leaves(kept))
    np.testing.assert_array_equal(params["dense"]["kernel"], PARAMS["dense"]["kernel"])


@other
def test_a_none_gradient_leaves_parameter_state_and_clock_alone(entry):
    opt = make(entry, enable_global_step=True)
    opt.step(GRADS)
    before = snapshot(opt)
    opt.step({**GRADS, "scale": None})
    after = snapshot(opt)
    chex.assert_trees_all_equal(before[0]["scale"], after[0]["scale"])
    chex.assert_trees_all_equal(before[1]["scale"], after[1]["scale"])
    assert float(opt.state["scale"]["step"]) == 1
    assert float(opt.state["dense.bias"]["step"]) == 2
    # The same as a parameter that never saw the middle step, through a state dict.
    twin = make(entry, enable_global_step=True)
    twin.load_state_dict(opt.state_dict())
    alone = make(entry, {"scale": PARAMS["scale"]})
    alone.step({"scale": GRADS["scale"]})
    alone.step({"scale": GRADS["scale"]})
    opt.step(GRADS)
    np.testing.assert_allclose(opt.params["scale"], alone.params["scale"], rtol=1e-6)


def test_a_closure_with_aux():
    opt = optim.SGD(PARAMS, lr=0.1)
    loss, aux = opt.step(lambda p: (p["scale"] ** 2, {"n": 3}), has_aux=True)
    assert (float(loss), aux) == (4.0, {"n": 3})


def test_step_needs_something():
    with pytest.raises(TypeError, match="step needs the gradients, or a closure"):
        optim.SGD(PARAMS, lr=0.1).step()


def test_a_step_of_a_captured_optimizer_is_refused():
    opt = optim.SGD(PARAMS, lr=0.1)
    with pytest.raises(RuntimeError, match=r"cerebras_jax\.trace"):
        jax.jit(lambda g: opt.step(g))(GRADS)
    opt.step(GRADS)


# --- groups ---------------------------------------------------------------------------------------


def test_groups_by_glob():
    groups = optim.param_groups(PARAMS, [{"params": ["*bias", "scale"], "weight_decay": 0.0}])
    opt = optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    assert [g["params"] for g in opt.param_groups] == [["dense.bias", "scale"], ["dense.kernel"]]
    opt.step(jax.tree.map(jnp.zeros_like, PARAMS))
    assert opt.params["scale"] == 2.0
    np.testing.assert_allclose(opt.params["dense"]["kernel"], 0.95)


def test_a_list_of_groups():
    opt = optim.SGD(
        [{"params": PARAMS["dense"], "lr": 0.5}, {"params": {"s": PARAMS["scale"]}}], lr=0.1
    )
    opt.step([GRADS["dense"], {"s": GRADS["scale"]}])
    dense, s = opt.params
    np.testing.assert_allclose(dense["bias"], -0.25)
    np.testing.assert_allclose(s["s"], 1.95)
    opt.step(lambda trees: trees[1]["s"])
    np.testing.assert_allclose(opt.params[1]["s"], 1.85)
    with pytest.raises(ValueError, match="list of 2 trees"):
        opt.step([GRADS["dense"]])


def test_values_of_a_group_are_live():
    opt = optim.SGD(PARAMS, lr=0.0)
    opt.step(GRADS)
    assert opt.params["scale"] == 2.0
    opt.param_groups[0]["lr"] = jnp.array(1.0)
    opt.step(GRADS)
    assert opt.params["scale"] == 1.5
    opt.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match=r"param_groups\[0\]: lr must be finite, got nan"):
        opt.step(GRADS)
    assert opt.params["scale"] == 1.5


def test_a_group_value_that_needs_a_new_buffer_is_refused():
    opt = optim.SGD(PARAMS, lr=0.1)
    opt.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="momentum_buffer.*not allocated"):
        opt.step(GRADS)
    opt = optim.AdamW(PARAMS)
    opt.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="max_exp_avg_sq.*not allocated"):
        opt.step(GRADS)


def test_add_param_group():
    opt = optim.AdamW(PARAMS, lr=0.1)
    opt.step(GRADS)
    before = opt.state["scale"]["exp_avg"]
    opt.add_param_group({"params": {"new": jnp.ones(2)}, "lr": 0.5})
    _, added = opt.params
    assert set(added) == {"new"}
    assert opt.param_groups[1]["lr"] == 0.5
    assert opt.state["scale"]["exp_avg"] == before
    assert float(opt.state["new"]["beta1_power"]) == pytest.approx(0.9)
    opt.step([GRADS, {"new": jnp.ones(2)}])
    np.testing.assert_allclose(opt.params[1]["new"], 0.5, rtol=1e-4)
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": {"again": opt.params[1]["new"]}})
    with pytest.raises(ValueError, match="lr must be >= 0"):
        opt.add_param_group({"params": {"other": jnp.ones(1)}, "lr": -1.0})
    assert len(opt.param_groups) == 2


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([{"params": "*nothing*"}], ValueError, "'\\*nothing\\*' matches none of the parameters"),
        ([{"params": "*"}, {"params": "scale"}], ValueError, "earlier groups already hold"),
        ([{"params": 3}], TypeError, "must be glob patterns or .*, got 3"),
    ],
)
def test_bad_globs(groups, error, message):
    with pytest.raises(error, match=message):
        optim.param_groups(PARAMS, groups)


# --- the documented methods -----------------------------------------------------------------------


@every
def test_signatures_show_the_same_arguments(entry):
    pure, cls = inspect.signature(entry.pure), inspect.signature(entry.cls)
    names = list(cls.parameters)
    assert names[0] == "params"
    of_class = ["enable_global_step", "state_dtype", "rounding", "pack", "around", "donate"]
    of_class += ["zero_axis", "state_memory"]
    assert names[-len(of_class) :] == of_class
    of_pure = ["state_dtype", "per_leaf_clocks", "rounding"]
    assert list(pure.parameters)[-len(of_pure) :] == of_pure
    hyper = [cls.parameters[n] for n in names[1 : -len(of_class)]]
    assert hyper == list(pure.parameters.values())[: -len(of_pure)]
    assert inspect.getdoc(entry.cls)


@every
def test_preinitialize_starts_over(entry):
    opt = make(entry)
    opt.step(GRADS)
    opt.preinitialize()
    fresh = make(entry, jax.tree.map(jnp.copy, opt.params))
    chex.assert_trees_all_equal(snapshot(opt), snapshot(fresh))


@every
def test_names_to_sparsify_are_states_like_their_parameter(entry):
    opt = make(entry)
    for name, p in opt.named_parameters():
        for state in set(opt.state_names_to_sparsify()) & set(opt.state[name]):
            assert opt.state[name][state].shape == p.shape


@every
def test_visit_state(entry):
    opt = make(entry)
    opt.step(GRADS)
    seen = []
    opt.visit_state(lambda x: seen.append(x))
    assert len(seen) == sum(len(entry) for entry in opt.state.values())
    opt.visit_state(jnp.zeros_like)
    assert all(not np.any(x) for s in opt.state.values() for x in s.values())


def test_global_step():
    opt = optim.SGD(PARAMS, lr=0.1, enable_global_step=True)
    assert opt.state["scale"]["step"] == 0
    step = opt.increment_global_step("scale")
    assert (float(step), step.dtype) == (1.0, jnp.float32)
    opt.step(GRADS)
    assert opt.state["scale"]["step"] == 2
    assert opt.state["dense.bias"]["step"] == 1
    with pytest.raises(RuntimeError, match="SGD does not count steps"):
        optim.SGD(PARAMS, lr=0.1).increment_global_step("scale")
    with pytest.raises(KeyError, match="nothing"):
        opt.increment_global_step("nothing")


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        optim.Optimizer(PARAMS)

    class Half(optim.Optimizer):
        def preinitialize(self):
            pass

    with pytest.raises(TypeError, match="abstract"):
        Half(PARAMS)


class Signs(optim.Optimizer):
    """A user's own subclass, with a step count."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr}, enable_global_step=True)

    def preinitialize(self):
        for name, p in self.named_parameters():
            self.state[name] = {"last": jnp.zeros_like(p)}

    def state_names_to_sparsify(self):
        return ["last"]

    def step(self, grads_or_closure):
        loss, grads = self.gradients(grads_or_closure)
        params = dict(self.named_parameters())
        for group in self.param_groups:
            for name in group["params"]:
                self.increment_global_step(name)
                self.set_parameter(name, params[name] - group["lr"] * jnp.sign(grads[name]))
                self.state[name]["last"] = grads[name]
        return loss


def test_a_subclass_of_ones_own():
    opt = Signs(PARAMS)
    loss = opt.step(lambda p: p["scale"] ** 2)
    assert float(loss) == 4.0
    np.testing.assert_allclose(opt.params["scale"], 1.9)
    opt.param_groups[0]["lr"] = 0.2
    opt.step(GRADS)
    np.testing.assert_allclose(opt.params["scale"], 1.7, rtol=1e-6)
    twin = Signs(PARAMS)
    twin.load_state_dict(opt.state_dict())
    assert twin.state["scale"]["step"] == 2
    assert twin.param_groups[0]["lr"] == 0.2
    again = jax.jit(lambda opt, g: (opt.step(g), opt)[1])(opt, GRADS)
    np.testing.assert_allclose(again.params["scale"], 1.5, rtol=1e-6)
    copy.deepcopy(opt).step(GRADS)


# --- state dicts ----------------------------------------------------------------------------------


@every
def test_state_dict_continues_exactly(entry):
    opt, twin = make(entry), make(entry)
    for _ in range(3):
        opt.step(GRADS)
    saved = opt.state_dict()
    twin.load_state_dict(pickle.loads(pickle.dumps(saved)))
    twin.set_parameter("scale", opt.params["scale"])
    for name, value in opt.named_parameters():
        twin.set_parameter(name, value)
    opt.step(GRADS)
    twin.step(GRADS)
    chex.assert_trees_all_equal(snapshot(opt), snapshot(twin))


def test_state_dict_has_torchs_layout():
    groups = optim.param_groups(PARAMS, [{"params": "scale", "lr": 0.5}])
    d = optim.AdamW(groups, lr=0.1).state_dict()
    assert set(d) == {"state", "param_groups", "optimizer"}
    assert set(d["state"]) == {0, 1, 2}
    assert d["param_groups"][0]["params"] == [0]
    assert d["param_groups"][0]["param_names"] == ["scale"]
    assert d["param_groups"][1]["params"] == [1, 2]
    assert d["param_groups"][0]["lr"] == 0.5
    assert set(d["state"][0]) == {"exp_avg", "exp_avg_sq", "beta1_power", "beta2_power"}


def test_loaded_by_name_where_names_agree():
    opt = optim.AdamW(PARAMS)
    opt.step(GRADS)
    d = opt.state_dict()
    order = [2, 0, 1]
    names = d["param_groups"][0]["param_names"]
    d["param_groups"][0]["param_names"] = [names[i] for i in order]
    d["state"] = {new: d["state"][old] for new, old in enumerate(order)}
    twin = optim.AdamW(PARAMS)
    twin.load_state_dict(d)
    chex.assert_trees_all_equal(twin.state_dict()["state"], opt.state_dict()["state"])


def broken(d, change):
    d = {
        "state": {k: dict(v) for k, v in d["state"].items()},
        "param_groups": [dict(g) for g in d["param_groups"]],
    }
    change(d)
    return d


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("state"), "no 'state'"),
        (lambda d: d["state"].pop(1), "lacks the state of parameter 'dense.kernel'"),
        (lambda d: d["state"][1].pop("exp_avg"), r"'dense.kernel': missing \['exp_avg'\]"),
        (lambda d: d["state"][1].update(x=np.ones(2)), r"unexpected \['x'\]"),
        (lambda d: d["state"][1].update(exp_avg=np.ones(2)), r"shape \(2,\), expected \(3, 2\)"),
        (lambda d: d["state"].update({7: d["state"][0]}), r"parameters \[7\] of no group"),
        (lambda d: d["param_groups"].append({"params": []}), "2 parameter groups, ours 1"),
        (lambda d: d["param_groups"][0].update(params=[0]), "has 1 parameters, ours 3"),
        (lambda d: d["param_groups"][0].update(lr=-1.0), "lr must be >= 0"),
        (lambda d: d["param_groups"][0].update(maximize=True), "maximize=False, got maximize=True"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change, message):
    opt = optim.AdamW(PARAMS, lr=0.3)
    opt.step(GRADS)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(broken(opt.state_dict(), change))
    chex.assert_trees_all_equal(snapshot(opt), before)
    assert opt.param_groups[0]["lr"] == 0.3


def test_step_of_other_libraries_becomes_the_powers():
    """torch.optim and Hugging Face store `step`; ours hold beta^(step + 1)."""
    opt = optim.AdamW({"w": jnp.ones(2)}, betas=(0.9, 0.99))
    zeros = np.zeros(2, np.float32)
    for step, power in ((0, 0.9), (3, 0.9**4)):
        opt.load_state_dict(
            {
                "state": {0: {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros}},
                "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}],
            }
        )
        np.testing.assert_allclose(opt.state["w"]["beta1_power"], power, rtol=1e-6)
    assert opt.param_groups[0]["correct_bias"] is True  # a missing key takes the default


def test_loaded_arrays_are_copied():
    opt = optim.SGD({"w": jnp.ones(2)}, lr=0.1, momentum=0.9)
    mine = jnp.array([1.0, 2.0])
    opt.load_state_dict(
        {
            "state": {0: {"momentum_buffer": mine}},
            "param_groups": [{"params": [0], "momentum": 0.9}],
        }
    )
    opt.step({"w": jnp.ones(2)})
    opt.step({"w": jnp.ones(2)})
    np.testing.assert_array_equal(mine, [1.0, 2.0])


# --- copies, pytrees, display ---------------------------------------------------------------------


@every
def test_pickle_and_deepcopy(entry):
    opt = make(entry)
    opt.step(GRADS)
    for twin in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
        chex.assert_trees_all_equal(snapshot(twin), snapshot(opt))
        twin.step(GRADS)
        assert not np.array_equal(snapshot(twin)[0]["scale"], snapshot(opt)[0]["scale"])


@one
def test_an_optimizer_is_a_pytree(entry):
    opt, expected = make(entry), make(entry)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def f(opt, grads):
        opt.step(grads)
        return opt

    chex.clear_trace_counter()
    for _ in range(3):
        opt = f(opt, GRADS)
        expected.step(GRADS)
    assert type(opt) is type(expected)
    chex.assert_trees_all_close(snapshot(opt), snapshot(expected), rtol=1e-6)
    leaves, treedef = jax.tree.flatten(opt)
    chex.assert_trees_all_equal(snapshot(treedef.unflatten(leaves)), snapshot(opt))


def test_repr():
    opt = optim.AdamW(PARAMS, lr=0.25)
    opt.param_groups[0]["weight_decay"] = jnp.float32(3e-4)
    text = repr(opt)
    assert text.startswith("AdamW (")
    assert "lr: 0.25" in text
    assert "weight_decay: 0.0003\n" in text
    assert "3 arrays, 9 elements" in text
    assert text.splitlines()[-2].startswith("    params")  # no setting is shown that is a default


def test_settings_are_shown():
    opt = optim.AdamW(PARAMS, lr=0.25, rounding="stochastic", state_dtype={"exp_avg": "bfloat16"})
    opt.skip_nonfinite, opt.max_gradient_norm = True, 1.5
    for text in (repr(opt), opt._repr_html_()):
        for shown in ("skip_nonfinite: True", "max_gradient_norm: 1.5", "rounding: stochastic"):
            assert shown in text
        assert "exp_avg" in text


@pytest.mark.parametrize(
    ("name", "value"), [("state_dtype", "bfloat16"), ("rounding", "exact"), ("zero_axis", "data")]
)
def test_what_states_are_allocated_with_is_not_edited(name, value):
    opt = optim.AdamW(PARAMS, lr=0.25)
    with pytest.raises(AttributeError, match=f"{name} is chosen when AdamW is made"):
        setattr(opt, name, value)
    setattr(opt, name, getattr(opt, name))


def test_rich_display():
    groups = optim.param_groups(PARAMS, [{"params": "scale", "lr": 0.5}])
    text = optim.AdamW(groups, lr=0.25)._repr_html_()
    assert "3 arrays" in text
    assert "<td>0.5</td>" in text
    assert "<td>0.25</td>" in text
    # two moments of 9 float32, and per parameter a count and two powers
    assert f"{2 * 9 * 4 + 3 * 3 * 4:,} bytes of state" in text


def test_zero_grad_is_accepted():
    assert optim.SGD(PARAMS, lr=0.1).zero_grad(set_to_none=True) is None


def test_a_schedule_as_a_group_value():
    opt = optim.SGD({"w": jnp.zeros(())}, lr=schedules.linear(1.0, 0.0, 10))
    for _ in range(3):
        opt.step({"w": jnp.ones(())})
    np.testing.assert_allclose(opt.params["w"], -2.7, rtol=1e-6)
    twin = optim.SGD({"w": opt.params["w"]}, lr=schedules.linear(1.0, 0.0, 10))
    twin.load_state_dict(opt.state_dict())
    twin.step({"w": jnp.ones(())})
    np.testing.assert_allclose(twin.params["w"], -3.4, rtol=1e-6)


# --- modules --------------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(12)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def test_a_module_is_updated_in_place():
    module, x = Net(nnx.Rngs(0)), jnp.ones((4, 2))
    tree = nnx.to_pure_dict(nnx.state(Net(nnx.Rngs(0)), nnx.Param))
    opt = optim.AdamW(module, lr=0.1)
    assert opt.params is module
    assert "layers.11.kernel" in opt.param_groups[0]["params"]
    kept = module.norm.scale[...]
    expected = optim.AdamW(tree, lr=0.1)
    for _ in range(3):
        grads = nnx.grad(lambda m: (m(x) - 3 * x[0]).sum() ** 2 + m.norm.scale.sum())(module)
        opt.step(grads)
        expected.step(nnx.to_pure_dict(grads))
    chex.assert_trees_all_close(nnx.to_pure_dict(nnx.state(module, nnx.Param)), expected.params)
    np.testing.assert_array_equal(kept, 1.0)


def test_a_closure_of_a_module():
    module = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    opt = optim.SGD(module, lr=0.1)
    losses = [float(opt.step(lambda m: (m(jnp.ones((1, 2))) ** 2).sum())) for _ in range(5)]
    assert losses[-1] < losses[0]
    twin = pickle.loads(pickle.dumps(opt))
    twin.step(lambda m: (m(jnp.ones((1, 2))) ** 2).sum())
    assert not np.array_equal(twin.params.kernel[...], module.kernel[...])


def test_gradients_of_a_module_must_fit():
    opt = optim.SGD(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), lr=0.1)
    with pytest.raises(ValueError, match=r"missing: \['bias'\]"):
        opt.step(nnx.State({"kernel": jnp.ones((2, 1))}))
    with pytest.raises(TypeError, match="nnx.State, found list"):
        opt.step([jnp.ones(1)])


def test_groups_of_a_module():
    module = Net(nnx.Rngs(0))
    opt = optim.SGD(optim.param_groups(module, [{"params": "norm.*", "lr": 0.0}]), lr=0.1)
    scale = module.norm.scale[...]
    opt.step(nnx.grad(lambda m: m(jnp.ones((3, 2))).sum() + m.norm.scale.sum())(module))
    np.testing.assert_array_equal(module.norm.scale[...], scale)


def test_an_optimizer_of_a_module_is_a_pytree():
    module = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    opt = optim.SGD(module, lr=0.1)
    new = jax.jit(lambda o: (o.step(lambda m: m(jnp.ones((1, 2))).sum()), o)[1])(opt)
    np.testing.assert_allclose(new.params.bias[...], -0.1)
    np.testing.assert_array_equal(module.bias[...], 0.0)


def test_arrays_of_numpy_stay_their_owners():
    """JAX may use the memory of a NumPy array; whether it does depends on where that lies."""
    for _ in range(8):
        given = [np.ones((64, 64), np.float32) for _ in range(3)]
        opt = optim.SGD({"a": given[0], "b": jnp.zeros((64, 64))}, lr=0.1, momentum=0.9)
        opt.set_parameter("b", given[1])
        opt.visit_state(lambda x, given=given: given[2] if x.shape == (64, 64) else None)
        for x in given:
            x[:] = 5.0
        held = [*jax.tree.leaves(opt.params), opt.state["a"]["momentum_buffer"]]
        assert all(isinstance(x, jax.Array) and (x == 1.0).all() for x in held)
