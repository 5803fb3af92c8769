"""The repository stays what it is for: seven files that stand alone, and sums that they keep to."""
import ast
import dataclasses
import re
import sys
from pathlib import Path

import pytest

import sdft
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
    assert lines(SEVEN) <= 2800
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
    """(our functions that a tiny default run enters, the calls from main to forward_kl)."""
    from conftest import make_folder
    tmp, entered, stacks = tmp_path_factory.mktemp("traced"), set(), []
    folder = make_folder(tmp / "model")

    def profile(frame, event, arg):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.parent in (ROOT, ROOT / "extras"):
            if not frame.f_code.co_name.startswith("<"):
                entered.add((path.name, frame.f_code.co_qualname))
            if frame.f_code is sdft.forward_kl.__code__ and frame.f_back and not stacks \
                    and frame.f_back.f_code is sdft.backward.__code__:
                while frame.f_code is not train.main.__code__:
                    stacks.append(frame.f_code.co_name)
                    frame = frame.f_back
    sys.setprofile(profile)
    try:
        assert train.main(["--model", str(folder), "--out", str(tmp / "out"), *TINY]) == 0
    finally:
        sys.setprofile(None)
    return entered, stacks


def test_a_default_run_enters_few_files_and_functions(traced):
    entered, _ = traced
    assert len({file for file, _ in entered}) <= 7
    assert len(entered) <= 210


def test_few_calls_lead_from_main_to_the_loss(traced):
    _, stack = traced
    assert stack and len(stack) <= 6, stack
