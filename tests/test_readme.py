"""README cannot drift: its commands are the ones that work, its table of equations names functions and tests that exist."""
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
            for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_every_train_command_in_readme_parses():
    found = [part for line in COMMANDS for part in line.split("&&") if "train.py" in part]
    assert len(found) >= 4
    for command in found:
        words = shlex.split(command, comments=True)
        train.parse(words[words.index("train.py") + 1:])


def test_every_file_that_readme_installs_from_exists():
    for name in re.findall(r"-r (\S+)", " ".join(COMMANDS)):
        assert (ROOT / name).is_file(), name


def test_the_two_commands_are_the_ones_of_the_issue():
    assert any("requirements.txt" in c and "python train.py --degrade int4" in c for c in COMMANDS)
    assert any("tests/requirements.txt" in c and "pytest" in c for c in COMMANDS)


@pytest.mark.parametrize("row", re.findall(r"^\|.*\| `(\w+\.[\w.]+)` \| `(test_\w+\.py)::(\w+)` \|$", README, re.M))
def test_equation_table_names_what_exists(row):
    function, file, test = row
    module, *steps = function.split(".")
    target = importlib.import_module(module)
    for step in steps:
        target = getattr(target, step)
    assert target.__doc__
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_equation_table_is_there():
    assert len(re.findall(r"^\|.*\| `\w+\.[\w.]+` \| `test_\w+\.py::\w+` \|$", README, re.M)) >= 12


def test_defaults_in_readme_are_the_defaults():
    for name, value in re.findall(r"`--([a-z-]+) ([^`\s]+)` \(default\)", README):
        assert str(getattr(train.Config(), name.replace("-", "_"))) == value, name
