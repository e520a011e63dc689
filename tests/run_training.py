"""The command, in which one process may come to harm: run_training.py HARM ARGUMENTS...

HARM is "none", or "SIGNAL at PLACE in PROCESS" where PLACE is "save" or "step" and its number,
such as "SIGSTOP at save8 in 1".
"""

import os
import signal
import sys

import jax

from cerebras_jax.checkpoint import store
from cerebras_jax.train import run
from cerebras_jax.train.cli import main


def harm(number, place, process):
    """Sends this process a signal when it comes to a place."""
    write, batch = store.Series.write, run.Run.batch

    def harmed_write(self, step, *args):
        write(self, step, *args)
        if place == f"save{step}" and jax.process_index() == process:
            os.kill(os.getpid(), number)

    def harmed_batch(self, step):
        if place == f"step{step}" and jax.process_index() == process:
            os.kill(os.getpid(), number)
        return batch(self, step)

    store.Series.write, run.Run.batch = harmed_write, harmed_batch


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what != "none":
        name, _, place, _, process = what.split()
        harm(getattr(signal, name), place, int(process))
    main(arguments, prog_name="cerebras-jax")
