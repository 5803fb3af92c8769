"""The repository stays what it is for: seven files that stand alone, and sums that they keep to."""
import ast
import cProfile
import dataclasses
import re
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
SEVEN = [ROOT / f"{name}.py" for name in "sdft cka quant prune model data train".split()]
EXTRAS = sorted((ROOT / "extras").glob("*.py"))
TINY = ["--steps", "2", "--batch-size", "2", "--eval-limit", "4", "--eval-tokens", "4",
        "--rollout-tokens", "4", "--teacher-check", "2", "--cka-samples", "4",
        "--group-size", "16", "--degrade", "int4"]


def lines(paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_sums():
    assert lines(SEVEN) <= 3660  # the aim is 2,800; it is not reached yet
    assert lines(EXTRAS) <= 1600
    assert lines((ROOT / "paper").glob("*.py")) <= 900
    assert lines((ROOT / "tests").rglob("*.py")) <= 7500


def test_nothing_else_stands_at_the_root():
    known = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", "extras", "paper",
             "tests", "out", "runs", "__pycache__"}
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert there - known == {path.name for path in SEVEN}


def test_options_and_fields():
    assert len(dataclasses.fields(train.Config)) + 1 <= 42  # and --with
    for path in [*SEVEN, *EXTRAS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name not in ("Config", "GPTConfig"):
                assert sum(isinstance(x, ast.AnnAssign) for x in node.body) <= 12, node.name


def imports(path):
    """Names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_extra_knows_another_and_the_seven_know_none():
    for path in [*SEVEN, *EXTRAS]:
        others = {name for name in imports(path) if name.split(".")[0] in ("extras", "paper")}
        assert not others, path.name
    for path in SEVEN:
        names = re.findall(r"extras[/.](\w+)", path.read_text())
        assert not names, (path.name, names)


def test_lines_are_short():
    for path in [*SEVEN, *EXTRAS, *(ROOT / "paper").glob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert max(map(len, path.read_text().splitlines()), default=0) <= 100, path.name


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """{function: those that call it}, as (file, line, name), for what a tiny run enters."""
    from conftest import make_folder
    tmp, profile = tmp_path_factory.mktemp("traced"), cProfile.Profile()
    argv = ["--model", str(make_folder(tmp / "model")), "--out", str(tmp / "out"), *TINY]
    assert profile.runcall(train.main, argv) == 0
    profile.create_stats()

    def ours(function):
        return Path(function[0]).parent in (ROOT, ROOT / "extras")
    return {f: set(callers) for f, (*_, callers) in profile.stats.items() if ours(f)}


def test_a_default_run_enters_few_files_and_functions(traced):
    entered = {f for f in traced if not f[2].startswith("<")}
    assert 5 <= len({file for file, *_ in entered}) <= 7
    assert 100 <= len(entered) <= 210


def test_few_calls_lead_from_main_to_the_loss(traced):
    calls, found = 0, {f for f in traced if f[2] == "forward_kl"}
    while "main" not in {f[2] for f in found}:
        calls, found = calls + 1, set().union(*(traced.get(f, ()) for f in found))
        assert calls <= 6
