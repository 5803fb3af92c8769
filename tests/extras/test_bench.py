"""extras/bench.py: a tiny job by its parts, plain and with an extra."""
import subprocess
import sys
from pathlib import Path

import pytest

import train

BENCH = Path(train.__file__).parent / "extras" / "bench.py"


@pytest.mark.skipif(not BENCH.exists(), reason="extras/bench.py was deleted")
def test_a_tiny_job_is_measured_by_its_parts(folder):
    argv = ["--model", str(folder), "--degrade", "none", "--batch-size", "2", "--new-tokens", "3",
            "--steps", "1", "--warmup", "1", "--dtype", "float32"]
    done = subprocess.run([sys.executable, str(BENCH), *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("ours float32", "rollout", "score", "backward", "other", "GiB"):
        assert part in done.stdout
