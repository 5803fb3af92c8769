"""README and RESULTS cannot drift: their commands are the ones that work, their tables name what
exists, their links lead somewhere."""
import ast
import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import damage
import data
import experiments
import sdft
import train

ROOT = Path(train.__file__).parent
README, RESULTS = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md"))
BOTH = README + "\n" + RESULTS
COMMANDS = [line.strip() for block in re.findall(r"```(?:bash|sh)\n(.*?)```", BOTH, re.S)
            for line in block.replace("\\\n", " ").splitlines() if line.strip()]
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(
    r"```.*?```", "", BOTH, flags=re.S))]


def calls_of(program, lines):
    """The words after the program's name, in each command that calls it."""
    found = []
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if program in words:
                found.append(words[words.index(program) + 1:])
    return found


# ----------------------------------------------------------------------------------- commands

def test_every_train_command_parses():
    found = calls_of("train.py", COMMANDS)
    found += calls_of("train.py", [span for span in SPANS if span.startswith("python train.py")])
    assert len(found) >= 4
    for words in found:
        if words != ["--help"]:
            train.check_bounds(train.parse(words))


def test_every_experiments_command_parses():
    """With the options of its runs, which must go together with those that are added."""
    begun = [span for span in SPANS if span.startswith("python experiments.py ")]
    found = calls_of("experiments.py", COMMANDS + [span for span in begun if "…" not in span])
    named = set()
    for words in found:
        if words[0] == "report":
            assert experiments.parse_report(words[1:]).runs
            continue
        if words[0] == "keep":
            assert experiments.parse_keep(words[1:]).runs
            continue
        asked, further = experiments.parse_experiments(words)
        named |= set(asked.experiments)
        for name in asked.experiments:
            for options in experiments.EXPERIMENTS[name]:
                command = experiments.with_options(options.split(), further)
                train.check_bounds(train.parse(command))
    assert named == set(experiments.EXPERIMENTS)


def test_every_file_that_is_installed_from_exists():
    found = re.findall(r"-r (\S+)", " ".join(COMMANDS))
    assert found
    for name in found:
        assert (ROOT / name).is_file(), name


PINS = ["requirements.txt", "tests/requirements.txt", "tests/bench-requirements.txt"]


def test_every_requirement_is_pinned():
    """And nothing twice, but for what benchmarks and tests share."""
    found = {}
    for name in PINS:
        for line in (ROOT / name).read_text().splitlines():
            if not line.startswith("-r "):
                package, version = re.fullmatch(r"([a-z0-9-]+)==(\d[\w.]*)( +# .+)?",
                                                line).groups()[:2]
                assert found.setdefault(package, version) == version, package
    assert len(found) > 15


def test_refreshing_the_pins_writes_versions_and_nothing_else(tmp_path):
    """Not torch's, and no package's whose name only begins alike; comments and order stay."""
    (tmp_path / "tests").mkdir()
    for name in (*PINS, "tests/refresh-pins"):
        shutil.copy(ROOT / name, tmp_path / name)
    versions = "NumPy==9.1\ntorch==3.0+cpu\ntokenizers-x==7\ntransformers==6.0.0rc1\nsome_x==1\n"
    subprocess.run([tmp_path / "tests" / "refresh-pins", "rewrite"], input=versions, text=True,
                   check=True)
    changed = 0
    for name in PINS:
        before, after = ((root / name).read_text() for root in (ROOT, tmp_path))
        expected = re.sub("^numpy==[^ \n]+", "numpy==9.1", before, flags=re.M)
        expected = re.sub("^transformers==[^ \n]+", "transformers==6.0.0rc1", expected, flags=re.M)
        assert after == expected
        changed += after != before
    assert changed == len(PINS)
    assert not list(tmp_path.rglob("*.part"))


def test_the_two_commands_are_the_ones_of_the_issue():
    assert any("requirements.txt" in c and "python train.py --degrade int4" in c for c in COMMANDS)
    assert any("tests/requirements.txt" in c and "pytest" in c for c in COMMANDS)


def flags():
    """Every option that there is, of ours and of the programs that the texts name."""
    known = {"--help", "--nproc_per_node"}
    for f in dataclasses.fields(train.Config):
        known |= {train.flag(f.name)} | ({"--no-" + train.flag(f.name)[2:]} if f.type is bool
                                         else set())
    source = (ROOT / "bench.py").read_text() + (ROOT / "experiments.py").read_text()
    return known | set(re.findall(r'"(--[a-z-]+)"', source))


def test_every_option_that_is_named_exists():
    named = {word for text in (*SPANS, *COMMANDS) for word in re.findall(r"--[a-z][a-z_-]*", text)}
    assert len(named) > 40 and named - flags() == set()


# -------------------------------------------------------------------------- the equations' table

ROW = r"^\|.*\| `(\w+\.[\w.]+)` \| `(test_\w+\.py)::(\w+)` \|$"


@pytest.mark.parametrize("row", re.findall(ROW, README, re.M), ids="::".join)
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
    """Each of its lines is read above."""
    table = README.split("## Beside the paper")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 12 and all(re.match(ROW, row) for row in rows)


# ------------------------------------------------------------------------------------- options

def test_defaults_are_the_defaults():
    found = re.findall(r"`--([a-z-]+) ([^`\s]+)` \(default\)", BOTH)
    assert found
    for name, value in found:
        assert str(getattr(train.Config(), name.replace("-", "_"))) == value, name


def groups():
    """{the first word of a group's title: its options}, as --help has them."""
    found = {}
    for f in dataclasses.fields(train.Config):
        if "group" in f.metadata:
            mine = found[re.match(r"\w+( and \w+)?", f.metadata["group"])[0]] = []
        mine.append(train.flag(f.name))
    return found


def test_readme_lists_every_option_in_its_group():
    lines = re.findall(r"(?:^  -|;) \*\*([\w ]+)\*\*[^`]*`(--[^`]+)`(?=;|$)", README, re.M)
    assert {name: sorted(options.split()) for name, options in lines} == {
        name: sorted(options) for name, options in groups().items()}


def test_help_shows_every_option_in_its_group():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(groups()) == 9
    parts = re.split(r"^(?=\w.*:$)", done.stdout, flags=re.M)
    for name, options in groups().items():
        shown = [part for part in parts if part.startswith(name)]
        assert len(shown) == 1, name
        for option in options:
            assert re.search(rf"^  {option}\b", shown[0], re.M), option


# --------------------------------------------------------------------------------- the fork's code

@pytest.fixture
def tables():
    """The three that a fork adds to; afterwards they are as before."""
    found = [sdft.LOSSES, damage.DAMAGES, data.TASKS, data.DEMOS]
    before = [dict(table) for table in found]
    yield found
    for table, entries in zip(found, before):
        table.clear()
        table.update(entries)


def test_the_forks_in_readme_run(tables, folder, tmp_path):
    """The block's code, where the names of all the files that it names are known; then a whole run
    with the options that its comments give."""
    block, = re.findall(r"```python\n(.*?)```", README, re.S)
    lengths = [len(table) for table in tables]
    pairs = [(f"Country {n}", f"City {n}") for n in range(40)]
    exec(block, vars(sdft) | vars(damage) | vars(data) | {"PAIRS": pairs})
    assert [len(table) for table in tables] == [n + 1 for n in lengths]
    options = " ".join(re.findall(r"# (--\S+ \S+)", block))
    assert {"--loss", "--degrade", "--data", "--demo"} <= set(options.split())
    command = (f"--model {folder} --out {tmp_path}/out --steps 2 --batch-size 4 --eval-limit 6 "
               f"--rollout-tokens 4 --eval-tokens 4 --cka-samples 5 {options}")
    assert train.main(command.split()) == 0


# ------------------------------------------------------------------------------ layout and links

def prose(text):
    """(number, line) of what stands in no code block and in no table."""
    inside, found = False, []
    for n, line in enumerate(text.splitlines(), 1):
        inside ^= line.startswith("```")
        if not inside and not line.startswith(("|", "```")):
            found.append((n, line))
    return found


def test_readme_is_short():
    assert len(README.splitlines()) <= 220


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README", "RESULTS"])
def test_lines_and_cells_can_be_read(text):
    assert [n for n, line in prose(text) if len(line) > 160] == []
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")]
    assert [cell for cell in cells if len(cell) > 120] == []


def anchor(heading):
    """A heading's anchor: small letters, blanks as hyphens, no other signs."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_link_leads_somewhere():
    texts, found = {"README.md": README, "RESULTS.md": RESULTS}, 0
    for name, text in texts.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            file, _, place = target.partition("#")
            assert (ROOT / (file or name)).exists(), (name, target)
            if place:
                headings = [line.lstrip("# ") for _, line in prose(texts[file or name])
                            if line.startswith("#")]
                assert place in map(anchor, headings), (name, target)
            found += 1
    assert found >= 4
