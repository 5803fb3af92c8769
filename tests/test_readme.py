"""README and requirements keep to what is there."""
import re
import shlex
from pathlib import Path

import pytest

import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| `(\w+)\.(\w+)` \| `(test_\w+)` \|$", README, re.M)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.splitlines() if line.startswith("python train.py")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    c, _ = train.parse(shlex.split(command, comments=True)[2:])
    c.degrade = c.degrade or "none"
    train.damages(c)


def test_the_commands_are_there():
    assert len(COMMANDS) >= 6
    assert "pip install -r requirements.txt && python train.py --degrade int4" in README
    assert "pip install -r tests/requirements.txt && ruff check . && pytest" in README


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2])
def test_each_equation_leads_to_a_function_and_a_test(row):
    _, module, function, test = row
    assert re.search(rf"^(def|class) {function}\b", (ROOT / f"{module}.py").read_text(), re.M)
    texts = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    assert any(re.search(rf"^def {test}\b", text, re.M) for text in texts)


def test_the_table_covers_the_paper():
    assert len(ROWS) >= 15
    assert {f"({n})" for n in "1234"} <= set(re.findall(r"\(\d\)", " ".join(r[0] for r in ROWS)))


def test_every_option_that_is_named_exists():
    known = {"--" + name.replace("_", "-") for name in train.Config.__dataclass_fields__}
    known |= {f"--no-{name[2:]}" for name in known} | {
        "--with", "--shard", "--seed", "--nproc_per_node", "--help", "--dry-run"}
    assert set(re.findall(r"--[a-z][a-z_-]+", README)) <= known


def test_sizes():
    assert len(README.encode()) <= 13.5 * 1024
    prose = re.sub(r"```.*?```", "", README, flags=re.S).splitlines()
    assert max(len(line) for line in prose if not line.startswith(("|", "!["))) <= 110


def test_every_link_leads_somewhere():
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize("file", ["requirements.txt", "tests/requirements.txt"])
def test_every_requirement_is_pinned(file):
    for line in (ROOT / file).read_text().splitlines():
        assert re.match(r"-r |[\w-]+==[\w.]+( |$)|#", line), line
