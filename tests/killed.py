"""Runs a command that is killed when it would put the k-th file of a pattern in place.

python tests/killed.py 'minimizer.*' 3 warmstart.py -n F1
"""

import os
import runpy
import signal
import sys
from fnmatch import fnmatch
from pathlib import Path

_, pattern, number, *sys.argv = sys.argv
left, replace = int(number), os.replace


def replace_or_die(temporary, path):
    global left
    left -= fnmatch(Path(path).name, pattern)
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(temporary, path)


os.replace = replace_or_die  # by which large_batch.files puts every file in place
sys.path.insert(0, str(Path(__file__).parent.parent))
runpy.run_path(sys.argv[0], run_name="__main__")
