"""One of several processes that train together; see test_processes.py."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cerebras_jax as cjax
from cerebras_jax import optim, sharding

START = {"bias": np.ones(8, np.float32), "kernel": np.linspace(-1, 1, 32, dtype=np.float32)}


def put(x, *spec):
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def new():
    params = {name: put(x) for name, x in START.items()}
    opt = optim.AdamW(
        params, lr=0.1, weight_decay=0.1, zero_axis="data", state_memory={"exp_avg": "pinned_host"}
    )
    opt.max_gradient_norm = 1.0
    return opt, optim.lr_scheduler.LinearLR(opt, 0.1, 0.0, 10)


@cjax.trace
def step(opt, sched, x):
    loss = opt.step(lambda p: jnp.sum((p["kernel"] * x - 1) ** 2) + jnp.sum(p["bias"] ** 2))
    sched.step()
    return loss


def batch(i):
    return put(np.cos(np.arange(32, dtype=np.float32) * i), "data")


def report(opt, sched):
    print("result", cjax.fingerprint(opt.state_dict()["state"]), cjax.fingerprint(opt.params))


def train(me, folder):
    opt, sched = new()
    for i in range(3):
        step(opt, sched, batch(i))
    loaded, other = new()
    loaded.load_state_dict(on_host(opt.state_dict()))
    other.load_state_dict(sched.state_dict())
    cjax.save(f"{folder}/saved", opt=opt, sched=sched)
    print("restored", cjax.fingerprint(opt.state_dict()["state"]), cjax.fingerprint(opt.params))
    for i in range(3, 6):
        step(opt, sched, batch(i))
    report(opt, sched)
    opt.step({"bias": None, "kernel": opt.params["kernel"]})
    sharding.check_processes(opt, sched)


def on_host(tree):
    """A state dict in the memory of this process."""
    return jax.tree.map(
        lambda x: (
            multihost_utils.process_allgather(x, tiled=True)
            if isinstance(x, jax.Array) and not x.is_fully_addressable
            else x
        ),
        tree,
        is_leaf=lambda x: isinstance(x, str),
    )


def resume(me, folder):
    opt, sched = new()
    cjax.restore(f"{folder}/saved", opt=opt, sched=sched)
    print("restored", cjax.fingerprint(opt.state_dict()["state"]), cjax.fingerprint(opt.params))
    for i in range(3, 6):
        step(opt, sched, batch(i))
    report(opt, sched)


def differ(me, folder):
    opt, _ = new()
    opt.param_groups[0]["lr"] = 0.1 * (1 + me)
    for what, attempt in {
        "check": lambda: sharding.check_processes(opt),
        "save": lambda: cjax.save(f"{folder}/differs", opt=opt),
        "construct": lambda: optim.SGD(opt.params, lr=0.1 * (1 + me)),
        "load": lambda: opt.load_state_dict(
            {**new()[0].state_dict(), "param_groups": opt.state_dict()["param_groups"]}
        ),
    }.items():
        try:
            attempt()
        except ValueError as error:
            print("refused", what, error)


if __name__ == "__main__":
    what, folder, port = sys.argv[1:4]
    me, count = map(int, sys.argv[4:6])
    # On CPU, programs that were dispatched at once may communicate in another order elsewhere.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, me, heartbeat_timeout_seconds=600)
    {"train": train, "resume": resume, "differ": differ}[what](me, folder)
    multihost_utils.sync_global_devices("done")
    print("done", flush=True)
    os._exit(0)  # a busy machine must not fail in taking leave
