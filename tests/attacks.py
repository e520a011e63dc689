"""Malicious pickles, and an audit hook that sees what they do."""

import contextlib
import os
import pickle
import sys

import numpy as np

# A hook cannot be removed, so it looks away until it is asked to watch.
WATCHED = (
    "import", "exec", "compile", "open", "os.", "subprocess.", "socket.", "ctypes.", "shutil.",
    "pickle.", "marshal.", "code.", "pty.", "builtins.input", "urllib.", "webbrowser.", "glob.",
    "tempfile.", "sqlite3.", "cpython.", "setopencodehook", "mmap.",
)  # fmt: skip
_seen: list | None = None


def _hook(event, args):
    if _seen is not None and event.startswith(WATCHED):
        _seen.append((event, args[:1]))


sys.addaudithook(_hook)
for codec in ("cp437", "raw_unicode_escape"):
    "".encode(codec)  # Python imports its codecs when it first needs them


@contextlib.contextmanager
def nothing_happens(*allowed):
    """Fails if the block imports, executes, opens or starts anything, but for ``allowed``."""
    global _seen
    _seen = []
    try:
        yield
    finally:
        seen, _seen = _seen, None
    names = {str(path) for path in allowed}
    looks = ("os.listdir", "os.scandir")  # into a folder that is to be read
    bad = [
        e
        for e in seen
        if not (e[0] in ("open", "mmap.__new__") and allowed)
        and not (e[0] in looks and str(e[1][0]) in names)
    ]
    opened = {str(e[1][0]) for e in seen if e[0] == "open"} - names
    assert not bad, bad
    assert not opened, opened


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def attacks(mark):
    shell = f"touch {mark}"
    code = f"open({mark!r}, 'w')"
    text = mark.encode()
    return {
        "os.system": pickle.dumps(Call(os.system, shell)),
        "eval": pickle.dumps({"state": Call(eval, code)}),
        "exec in depth": pickle.dumps([1, {"a": (Call(exec, code), Call(os.system, shell))}]),
        "getattr": pickle.dumps(Call(getattr, "", "join")),
        "open": pickle.dumps(Call(open, mark, "w")),
        "__import__": pickle.dumps(Call(__import__, "this")),
        "a state": pickle.dumps(Call(bytearray, 3, state={"x": Call(eval, code)})),
        "GLOBAL and REDUCE": b"cos\nsystem\n(S'touch " + text + b"'\ntR.",
        "INST": b"(S'touch " + text + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'touch " + text + b"'\no.",
        "NEWOBJ": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85}\x92.",
        "a dotted name": b"\x80\x04\x8c\x08builtins\x8c\x0cexec.__call__\x93\x8c\x011\x85R.",
        "BUILD": pickle.dumps(np.random.default_rng(0)),
        "an extension code": b"\x80\x02\x82\x01.",
        "a persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
        "a key": b"\x80\x02}cos\nsystem\nX\x04\x00\x00\x00true\x85RK\x01s.",
        "a set": b"\x80\x04\x8f(cos\nsystem\nX\x04\x00\x00\x00true\x85R\x90.",
        "a class of the file": b"\x80\x02cbuiltins\ntype\nX\x01\x00\x00\x00A)}\x87R.",
        "append to a call": b"\x80\x02ccollections\ndeque\n)R(K\x01K\x02e.",
        "cut": pickle.dumps(Call(os.system, shell))[:-3],
    }


NAMES = list(attacks("x"))
