"""The README's examples run, one after another."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert float(namespace["loss"]) < 9.0
    assert int(namespace["sched"].last_epoch) == 4


def test_commands_are_one_line_each():
    commands = re.findall(
        r"<!-- \w+ command -->\n```bash\n(.*?)```\n<!-- end -->", README, re.DOTALL
    )
    assert len(commands) == 2
    assert all(c.count("\n") == 1 for c in commands)
