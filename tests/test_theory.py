"""The snippets of docs/theory.md run as printed, top to bottom; they assert for themselves."""

import re
from pathlib import Path

THEORY = Path(__file__).parent.parent / "docs" / "theory.md"


def test_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", THEORY.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) > 10
    exec(compile("\n".join(snippets), str(THEORY), "exec"), {"__name__": "theory"})
