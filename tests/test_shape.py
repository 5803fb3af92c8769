"""The shape of this repository: who imports whom, how long a function is, what an import does."""
import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
FILES = sorted(ROOT.glob("*.py"))
OURS = {path.stem for path in FILES}
ALL = [*FILES, *sorted((ROOT / "tests").glob("*.py"))]
SEVEN = "sdft", "model", "quant", "prune", "cka", "data", "train"

IMPORTS = {  # of ours, at the top of each of the files that are the paper, and of some others
    "sdft": {"cka"}, "model": set(), "quant": set(), "prune": {"quant"}, "cka": set(),
    "data": {"files", "instructions", "rows", "tokenizer"}, "rows": {"files"},
    "instructions": set(), "template": {"files"},
    "tokenizer": {"bpe", "files", "pieces", "template"}, "pieces": {"bpe"}, "bpe": set(),
    "files": set(), "checkpoint": {"files", "gguf_file", "hf_config", "model"},
    "gguf_file": {"files", "hf_config", "model", "pieces"}, "hf_config": {"files", "model"},
    "fast": {"model", "sdft"},
    "evaluate": {"cka", "data", "files", "parallel", "sdft"},
    "damage": {"files", "parallel", "prune", "quant"},
    "guard": {"cka", "evaluate", "parallel", "sdft"}}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node):
    """The names of ours that a node imports."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & OURS
    return {node.module} & OURS if isinstance(node, ast.ImportFrom) else set()


def top_imports(module):
    """What of ours is imported when this module is."""
    return set().union(*map(imported, tree_of(ROOT / f"{module}.py").body))


def inner_imports(module):
    """[(function, what of ours it imports), …]."""
    found = []
    for function in ast.walk(tree_of(ROOT / f"{module}.py")):
        if isinstance(function, ast.FunctionDef):
            names = set().union(*map(imported, ast.walk(function)))
            found += [(function.name, name) for name in sorted(names)]
    return found


# ------------------------------------------------------------------------------------- imports

@pytest.mark.parametrize("module", IMPORTS)
def test_a_file_of_the_paper_imports_what_the_table_says(module):
    assert top_imports(module) == IMPORTS[module]


def test_what_is_imported_within_functions():
    """A model knows of file formats where it is read and written, and fast.py is chosen once."""
    found = {module: inner_imports(module) for module in OURS - {"bench"}}
    assert {module: names for module, names in found.items() if names} == {
        "model": [("from_pretrained", "checkpoint"), ("save_pretrained", "checkpoint")],
        "prepare": [("implementation", "fast")],
        "tokenizer": [("load_tokenizer", "checkpoint")], "train": [("whole_run", "proof")]}


def test_no_file_imports_itself_by_way_of_others():
    order, left = [], {module: top_imports(module) for module in OURS}
    while left:
        ready = [module for module, needs in left.items() if needs <= set(order)]
        assert ready, f"these import each other: {sorted(left)}"
        order += ready
        left = {module: needs for module, needs in left.items() if module not in ready}


def test_the_files_that_are_the_paper_are_there():
    assert set(SEVEN) <= OURS
    assert not {"hf_folder", "fetch", "machine", "lora", "report"} & OURS
    assert all(path.stem == "conftest" or path.stem.startswith("test_")
               for path in (ROOT / "tests").glob("*.py"))


def test_fast_can_be_deleted(folder, tmp_path):
    """Without the file a whole `--plain` run goes through, and its student is there."""
    assert not any("fast" in top_imports(module) for module in OURS)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in FILES:
        if path.stem != "fast":
            shutil.copy(path, copy)
    command = (f"train.py --plain --model {folder} --out {tmp_path}/out --steps 1 --batch-size 2 "
               "--rollout-tokens 4 --eval-tokens 3 --eval-limit 4 --cka-samples 4 --group-size 16")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *command.split()], cwd=copy, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "student" / "config.json").exists()


# ----------------------------------------------------------------------- types, lengths and tops

def test_the_types_in_the_files_that_are_the_paper_fit():
    """What mypy makes of them, as pyproject.toml says; the first time it takes a dozen seconds."""
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"Success: no issues found in {len(SEVEN)} source files\n"


def test_types_and_coverage_are_of_the_files_that_are_the_paper():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    files = [f"{name}.py" for name in sorted(SEVEN)]
    assert sorted(tools["mypy"]["files"]) == files
    assert sorted(tools["coverage"]["run"]["include"]) == ["./" + name for name in files]


def functions_of(path):
    return [node for node in ast.walk(tree_of(path))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_no_function_is_longer_than_40_lines_and_no_line_than_100_columns(path):
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions_of(path)}
    assert {name: n for name, n in lengths.items() if n > 40} == {}
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > 100] == []


def belongs_at_the_top(node):
    """An import, a function, a class, a docstring, a constant, or the block of a script."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
        names = [ast.unparse(target).strip("()") for target in targets]
        return all(name == "__all__" or re.fullmatch("_?[A-Z][A-Z0-9_]*", name)
                   for name in ", ".join(names).split(", "))
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "__name__ == '__main__'"
    return isinstance(
        node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_done_at_the_top_of_a_file(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree)
    assert [ast.unparse(node) for node in tree.body if not belongs_at_the_top(node)] == []


IMPORT_ALL = """
import os, random, sys
import numpy, torch, tiktoken, safetensors.torch, tqdm  # what they do is theirs
import torch.distributed.fsdp, torch.distributed.tensor

def state():
    return (dict(os.environ), sys.argv[:], random.getstate(), numpy.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
            torch.is_grad_enabled(), os.getcwd(), sorted(os.listdir()))

sys.argv[1:] = ["--no-such-option"]
before = state()
for name in {modules}:
    __import__(name)
assert state() == before
"""


def test_nothing_happens_on_import(tmp_path):
    """Nothing is said, no argument is parsed, no file is written; neither the environment nor any
    random state is another afterwards."""
    script = IMPORT_ALL.replace("{modules}", repr(sorted(OURS)))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    quiet = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment,
                           capture_output=True, text=True)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
