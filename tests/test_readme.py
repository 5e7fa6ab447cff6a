"""The README's Python runs, top to bottom, as a reader would type it."""

import doctest
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = README.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert blocks, "the README shows no Python"
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        if ">>>" in block[1]:
            example = doctest.DocTestParser().get_doctest(block[1], names, "README", str(README), line)
            runner = doctest.DebugRunner()  # raises at the first difference
            runner.run(example, clear_globs=False)
            names.update(example.globs)
        else:
            # Newlines in front, so that a traceback shows the README's own lines.
            exec(compile("\n" * line + block[1], README, "exec"), names)
