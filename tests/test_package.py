"""How the package is built: what imports what, how long things are, and what is installed."""

import ast
import functools
import graphlib
import json
import re
import shutil
import subprocess
import zipfile

import pytest
from conftest import ROOT, run_python

import campaign

FLOORS = {  # from the ground up, as in docs/design.md; a module imports from its own floor and from lower ones
    "ground": "backend ctrl_c dataset_sources datasets distribution errors files memory named progress store timit "
    "version",
    "mathematics": "functions gradients hessian layers losses models networks objective objectives optimizers recipes "
    "remedies samples sharpness_metric spectrum statistics subspace surface tracking training",
    "kept results": "measurements minimizers places shipped spectra",
    "commands": "claims cli curvature_figures evidence experiment figures ledger paper results runner "
    "scalars surface_figures tables trends verdicts",
}
FLOORS = {floor: set(modules.split()) for floor, modules in FLOORS.items()}
MODULES = {path.stem: ast.parse(path.read_text()) for path in sorted((ROOT / "large_batch").glob("*.py"))}
SCRIPTS = sorted(ROOT.glob("*.py"))


def imported(nodes: list[ast.AST]) -> set[str]:
    """Return the dotted names of what these statements import, and all within them: in functions, for types only."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            names |= imported(list(ast.iter_child_nodes(node)))
    return names


def of_package(names: set[str]) -> set[str]:
    """Return the modules of the package among dotted names."""
    return {name.split(".")[1] for name in names if name.startswith("large_batch.")} & set(MODULES)


ALL = {module: of_package(imported(tree.body)) for module, tree in MODULES.items()}


def test_every_module_has_its_floor():
    listed = [module for floor in FLOORS.values() for module in floor]
    assert sorted(listed) == sorted(set(MODULES) - {"__init__"})


def test_the_design_shows_these_floors():
    floors, floor = {}, None
    for line in (ROOT / "docs" / "design.md").read_text().splitlines():
        if row := re.fullmatch(r"\| ([\w ]*)\| (`[\w`, ]+) \|.*", line):
            floor = row[1].strip() or floor
            floors.setdefault(floor, set()).update(re.findall(r"`(\w+)`", row[2]))
    assert floors == FLOORS
    assert list(floors) == [*reversed(FLOORS)], "the highest one first"


def test_imports_point_downwards():
    height = {module: number for number, floor in enumerate(FLOORS.values()) for module in floor}
    for module, others in ALL.items():
        for other in others if module != "__init__" else ():
            assert height[other] <= height[module], f"{module} imports {other}"


def test_there_is_no_circle():
    graphlib.TopologicalSorter(ALL).prepare()


def test_there_are_at_most_eight_storeys():
    """With the scripts, and with all imports: within functions and for types, too."""

    @functools.cache
    def storey(module: str) -> int:
        return 1 + max(map(storey, ALL[module]), default=0)

    for script in SCRIPTS:
        used = of_package(imported(ast.parse(script.read_text()).body))
        assert max(map(storey, used), default=0) < 8, script.name


def test_the_package_stands_without_the_root():
    root = {path.stem for path in SCRIPTS} | {"benchmarks", "tests"}
    for module, tree in MODULES.items():
        assert not {name.split(".")[0] for name in imported(tree.body)} & root, module


def test_main_functions_are_short():
    for path in SCRIPTS:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                assert node.end_lineno - node.lineno < 40, path.name


def test_files_are_short():
    for path in (*SCRIPTS, *(path for folder in ("large_batch", "tests", "benchmarks") for path in find(folder))):
        assert len(path.read_text().splitlines()) <= 400, path


def find(folder):
    return (ROOT / folder).rglob("*.py")


def test_tensorflow_starts_with_the_objective_only():
    code = """
import sys
import large_batch
assert {"Objective", "RandomSubspace", "curvature", "sharpness"} <= set(dir(large_batch))
from large_batch import RandomSubspace, sharpness
assert not hasattr(large_batch, "nothing")
assert not {"tensorflow", "keras", "matplotlib"} & set(sys.modules)
import large_batch.hessian, large_batch.subspace, large_batch.sharpness_metric
from large_batch import Objective, RandomSubspace, curvature, sharpness
assert "tensorflow" in sys.modules
assert all(map(callable, (Objective, RandomSubspace, curvature, sharpness)))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


READ = """
import importlib, json, sys
from large_batch import cli
settings = importlib.import_module(sys.argv[1]).Settings
cli.define_flags(settings)
for arguments in json.loads(sys.argv[2]):
    cli.FLAGS(["script", *arguments])
    cli.read(settings)
"""


def test_the_commands_in_the_documents_have_the_flags_they_use():
    places = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "results" / "README.md", *SCRIPTS]
    texts = [*(path.read_text() for path in places if path.name != "campaign.py"), *campaign.COMMANDS]
    found = {}
    for words in re.findall(r"\b\w+\.py(?: +[^\s`|#(){}\"]+)+", "\n".join(texts)):
        script, *arguments = words.rstrip(".,").split()
        if (ROOT / script).exists() and arguments[0].startswith("-") and arguments[0] != "-->":
            found.setdefault(script.removesuffix(".py"), []).append(arguments)
    assert len(found) > 8
    for script, commands in found.items():
        done = run_python("-c", READ, script, json.dumps(commands))
        assert done.returncode == 0, (script, commands, done.stderr)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the files that git knows or would add, built in a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout")
    for name in names:
        if (ROOT / name).is_file():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "copy" / name)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-w", folder]
    done = run_python("-m", "pip", *build, ".", cwd=folder / "copy")
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_the_package_and_the_zoo_only(wheel):
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "large_batch").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name} | {"network_zoo.py"}
    with zipfile.ZipFile(wheel) as content:
        assert {name for name in content.namelist() if ".dist-info/" not in name} == files
    assert {"large_batch/py.typed", "large_batch/original_figures/C1.csv"} <= files


def test_an_installed_wheel_plots_over_the_original_curves(wheel, tmp_path):
    where = ["--target", tmp_path / "site"]
    done = run_python("-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", *where, wheel)
    assert done.returncode == 0, done.stderr
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path / "site")!r}]
from large_batch import __file__, __version__, figures, files, paper
assert __file__.startswith({str(tmp_path)!r})
assert __version__ in {wheel.name!r}
curve = paper.original_curve("C1")
files.write_all(figures.drawn(figures.parametric_plot([], [], curve, "C1", "path"), "C1"))
assert len(curve) == 25
"""
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "C1.png").exists()
