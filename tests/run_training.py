"""The command, in which one process may come to harm: run_training.py HARM ARGUMENTS...

HARM is "none", or "SIGNAL at PLACE in PROCESS" where PLACE is "save" or "step" and its number,
such as "SIGSTOP at save8 in 1". "OSError" stands for an error in place of a signal.
"""

import os
import signal
import sys

import jax

from cerebras_jax.checkpoint import store
from cerebras_jax.train import gpt, report, run
from cerebras_jax.train.cli import main


def harm(what, place, process):
    """Sends this process a signal when it comes to a place."""

    def come_to(here):
        if here == place and jax.process_index() == process:
            if what == "OSError":
                raise OSError("no disk")
            os.kill(os.getpid(), getattr(signal, what))

    write, batch = store.Series.write, run.Run.batch

    def harmed_write(self, step, *args):
        write(self, step, *args)
        come_to(f"save{step}")

    def harmed_batch(self, step):
        come_to(f"step{step}")
        return batch(self, step)

    store.Series.write, run.Run.batch = harmed_write, harmed_batch


if __name__ == "__main__":
    report.draw, gpt.generate = lambda *args: None, lambda *args: b""  # they take seconds
    what, *arguments = sys.argv[1:]
    if what != "none":
        name, _, place, _, process = what.split()
        harm(name, place, int(process))
    main(arguments, prog_name="cerebras-jax")
