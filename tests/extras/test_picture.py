"""extras/picture.py: drawn with and without a step, and for a run that broke."""
import math

import pytest

pytest.importorskip("matplotlib")
picture = pytest.importorskip("extras.picture")

TOKEN = {"token": " is", "student": 0.5, "teacher": 0.25, "favourite": "\n", "kl": 0.3}
KINDS = {"linear_debiased": [0.9, 0.8]}


def results(step, cka=0.9):
    kinds = {"linear_debiased": [cka, 0.8]}
    levels = {"degraded": kinds, "recovered": kinds}
    shown = {"prompt": "a $x^ prompt", "tokens": [TOKEN] * 3}
    return {"config": {"degrade": "int4"}, "stages": dict.fromkeys(("healthy", "recovered")),
            "cka": {"tokens": levels, "samples": levels},
            "cka_layers": {"recovered": [[1.0, 0.5], [0.5, 1.0]]},
            "step": {"recovered": {"first": [shown], "last": [shown]}} if step else {}}


@pytest.mark.parametrize("step", [True, False])
@pytest.mark.parametrize("cka", [0.9, math.nan])
def test_the_picture_is_drawn(step, cka, tmp_path):
    lines = [{"stage": "recovered", "step": n, "loss": 1.0, "kl": cka} for n in range(3)]
    picture.draw(results(step, cka), lines, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_it_comes_unasked_after_all_else_is_written(tmp_path):
    done = []
    parts = {"write": lambda c, *_: done.append(c.out)}
    picture.attach(parts)

    class Config:
        out = str(tmp_path)
    parts["write"](Config, results(True), {}, {})
    assert done == [str(tmp_path)] and (tmp_path / "report.png").exists()
