"""The README's Python runs as printed."""

import re
from pathlib import Path

import sde_diffusion as sd

README = Path(__file__).parent.parent / "README.md"


def test_snippets_run(capsys):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec("\n".join(snippets), names)
    shape, approximate_and_exact = capsys.readouterr().out.splitlines()
    assert shape.startswith("torch.Size([4, 1, 28, 28]) 10 ")
    approximate, exact = (float(number) for number in re.findall(r"tensor\((-?[\d.]+)\)", approximate_and_exact))
    # In two dimensions the trace is exact: what is left is the solver's error.
    assert abs(approximate - exact) < 2e-3
    assert names["CosineSDE"]().t_max < 1.0
    assert sd.sample(names["exact"].distribution.under(names["CosineSDE"]()), 2).samples.isfinite().all()
