"""The snippets of docs/landscape.md, one after the other in one process, as the page says."""

import re

from conftest import ROOT, run_python


def test_the_snippets_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "landscape.md").read_text(), re.DOTALL)
    done = run_python("-c", "\n".join(blocks))
    assert done.returncode == 0, done.stderr
    assert "eigenvalues above 0.1, and the standard error: " in done.stdout
    assert re.search(r"^trace: \d\S* ± \d", done.stdout, re.MULTILINE)
    assert re.search(r"^hidden -?\d\S* ± \d", done.stdout, re.MULTILINE)
