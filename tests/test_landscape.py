"""The snippets of docs/landscape.md, one after the other in one process, as a reader runs them."""

import re

import numpy as np
from conftest import ROOT, run_python


def test_the_snippets_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "landscape.md").read_text(), re.DOTALL)
    told = 'print(*found.loss.shape, *(f"{share:.3f}" for share in plane.axis_values))'
    done = run_python("-c", "\n".join([f"import sys; sys.path.insert(0, {str(ROOT)!r})", *blocks, told]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *shape, first, second = done.stdout.split()[-4:]
    assert shape == ["11", "11"]
    assert 50 < float(first) + float(second) <= 100
    with np.load(tmp_path / "my_surface.npz") as saved:
        assert saved["loss"].shape == saved["accuracy"].shape == (11, 11)
        assert saved["loss"].argmin() == 60, "at the minimizer, in the middle"
    assert (tmp_path / "my_surface.png").read_bytes().startswith(b"\x89PNG")
