"""The snippets of docs/landscape.md, one after the other in one process, as a reader runs them."""

import re

import numpy as np
from conftest import ROOT, run_python


def test_the_snippets_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "landscape.md").read_text(), re.DOTALL)
    told = 'print(*found.loss.shape, *(f"{share:.3f}" for share in plane.axis_values))'
    last = max(i for i, text in enumerate(blocks) if "surface.principal" in text)
    blocks.insert(last + 1, told.replace("print(", 'print("surface:", '))
    done = run_python("-c", "\n".join([f"import sys; sys.path.insert(0, {str(ROOT)!r})", *blocks]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Surfaces
    *shape, first, second = re.search(r"^surface: (.*)$", done.stdout, re.MULTILINE)[1].split()
    assert shape == ["11", "11"]
    assert 50 < float(first) + float(second) <= 100
    with np.load(tmp_path / "my_surface.npz") as saved:
        assert saved["loss"].shape == saved["accuracy"].shape == (11, 11)
        assert saved["loss"].argmin() == 60, "at the minimizer, in the middle"
    assert (tmp_path / "my_surface.png").read_bytes().startswith(b"\x89PNG")
    # The Hessian
    assert "eigenvalues above 0.1, and the standard error: " in done.stdout
    assert re.search(r"^trace: \d\S* ± \d", done.stdout, re.MULTILINE)
    assert re.search(r"^hidden -?\d\S* ± \d", done.stdout, re.MULTILINE)
