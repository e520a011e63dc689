"""Several processes that run one command, and none that waits for ever for one that is gone."""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import click
import jax
from jax.errors import JaxRuntimeError

from cerebras_jax.messages import shown
from cerebras_jax.processes import meet
from cerebras_jax.train.answers import EXPECTED, one_line

_ALIVE, _ENDED = "cerebras_jax/alive/", "cerebras_jax/ended/"
PATIENCE = (5, 86_400)
"""From how many seconds to how many a process may be silent."""


def check_options(
    distributed: bool, coordinator: str | None, process_id: int | None, processes: int | None
) -> None:
    """Refuses options of which a part is missing.

    Raises:
      ValueError: names the option and the rule.
    """
    given = {"--coordinator": coordinator, "--process-id": process_id, "--processes": processes}
    there = [name for name, value in given.items() if value is not None]
    if there and not distributed:
        raise ValueError(f"{', '.join(there)} must stand with --distributed")
    if there and len(there) < len(given):
        missing = [name for name in given if name not in there]
        raise ValueError(f"{', '.join(there)} must stand with {', '.join(missing)}")
    if coordinator is not None and not _is_address(coordinator):
        raise ValueError(
            "--coordinator must be HOST:PORT, with a port from 1 to 65535, got "
            f"{shown(coordinator)}"
        )
    if process_id is not None and processes is not None and process_id >= processes:
        raise ValueError(
            f"--process-id must be below --processes, got {process_id} for {processes}"
        )


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 2**16
    return is_port and re.fullmatch(r"[\w.-]+|\[[\w.:%]+\]", host) is not None


@contextlib.contextmanager
def joined(
    coordinator: str | None, process_id: int | None, processes: int | None, patience: int
) -> Iterator[None]:
    """This process as one of several meanwhile, which all run the same.

    An error ends this process at once, without a word to its devices, and the others say which
    process it was and end too. So they do if one is silent for ``patience`` seconds.

    Args:
      coordinator, process_id, processes: None: JAX finds them out of the cluster's environment.

    Raises:
      ValueError: if they cannot be found, or no connection comes about.
    """
    # On CPU, programs that were dispatched at once may communicate in another order elsewhere.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            heartbeat_timeout_seconds=2 * patience,  # JAX's own watch, should ours be gone
            shutdown_timeout_seconds=patience,
        )
    except (ValueError, RuntimeError) as error:
        hint = "" if coordinator else "; give --coordinator, --process-id and --processes"
        raise ValueError(f"--distributed: {error}{hint}") from None
    watch = _Watch(patience)
    try:
        yield
        meet("all is done")
    except BaseException as error:
        watch.leave(*_answer(error))
    watch.stop()
    jax.distributed.shutdown()


def _answer(error: BaseException) -> tuple[str, int]:
    """Says what ended this process; in one line, and as an exit code."""
    if isinstance(error, click.ClickException):
        error.show()
        return error.format_message(), error.exit_code
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return f"exit code {code}", code
    if not isinstance(error, (KeyboardInterrupt, *EXPECTED)):
        traceback.print_exception(error)
    else:
        click.echo(f"Error: {one_line(error)}", err=True)
    return one_line(error), 1


class _Watch:
    """Tells the other processes that this one lives, or why it ended, and listens to them.

    A step or a save waits for all processes, with nobody to wake it when one is gone: on some
    devices for ever, in the barriers of a save for 5 to 20 minutes. So a thread of its own ends
    this process when another one has said that it ended, or says nothing any more. What it says
    goes through the service that JAX's processes meet at.
    """

    def __init__(self, patience: float):
        # JAX has no public name for it.
        from jax._src.distributed import global_state

        self._client: Any = global_state.client
        self._me, self._count = jax.process_index(), jax.process_count()
        self._patience = patience
        self._pause = min(1.0, patience / 10)
        self._heard: dict[str, tuple[str, float]] = {}  # what each said last, and when it was new
        self._is_over = threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _run(self) -> None:
        beat = 0
        while not self._is_over.wait(self._pause):
            beat += 1
            try:
                self._client.key_value_set(f"{_ALIVE}{self._me}", str(beat), True)
                ended = dict(self._client.key_value_dir_get(_ENDED))
                alive = dict(self._client.key_value_dir_get(_ALIVE))
            except JaxRuntimeError as error:
                if not self._is_over.is_set():
                    self._end(f"process 0, where all meet, is gone: {one_line(error, 200)}")
                return
            for key, text in ended.items():
                self._end(f"process {key.rpartition('/')[2]} ended: {text}")
            if silent := self._silent(alive):
                who = "process" if len(silent) == 1 else "processes"
                self._end(f"{who} {', '.join(silent)} said nothing for {self._patience:g} s")

    def _silent(self, alive: dict[str, str]) -> list[str]:
        now = time.monotonic()
        for i in map(str, range(self._count)):
            text = alive.get(f"{_ALIVE}{i}", "")
            if i not in self._heard or self._heard[i][0] != text:
                self._heard[i] = text, now
        return [i for i, (_, since) in self._heard.items() if now - since > self._patience]

    def _end(self, why: str) -> None:
        if self._is_over.is_set():
            return
        last = "--resume goes on from the latest checkpoint"
        click.echo(f"Error: {why}; {last}", err=True)
        _exit(1)

    def leave(self, why: str, code: int) -> None:
        """Ends this process and says why, without waiting for the others."""
        self._is_over.set()
        with contextlib.suppress(JaxRuntimeError):
            self._client.key_value_set(f"{_ENDED}{self._me}", why, True)
        if self._me == 0:
            time.sleep(3 * self._pause)  # with it goes the service that the others hear it from
        _exit(code)

    def stop(self) -> None:
        """Ends the watch, as all is well."""
        self._is_over.set()


def _exit(code: int) -> None:
    """Ends the process as it is: an orderly end would wait for the others."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
