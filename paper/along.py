"""CKA and performance on the way of a recovery (§5.4), measured every few steps.

    python paper/along.py --degrade nf4 --eval-limit 150 --out runs/along/0-0

The options are train.py's. It is written as a fork would: `train.PARTS["training"]` gives the
function that is asked after each step, and here that also measures. The points stand in
OUT/along.json: [{"step", metric: value, "cka": {level: last layer's CKA}}, …].
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train

EVERY = 3  # steps between two points


def main(argv=None):
    """One run of train.py, with points; its exit code."""
    points, prepared, states = [], {}, {}
    training, prepare, states_of = train.PARTS["training"], train.prepare, train.states_of

    def prepare_and_keep(c):
        prepared.update(c=c, setup=prepare(c))
        return prepared["setup"]

    def healthy_states(setup, gpt, done=None):
        states.setdefault("healthy", states_of(setup, gpt, done))  # the first are the healthy ones
        return states_of(setup, gpt, done) if done else states["healthy"]

    def measured(name, student, memory, generator, best):
        stop = training(name, student, memory, generator, best)
        dtype = getattr(torch, prepared["c"].dtype)

        def stop_and_measure():
            done = stop and stop()
            if name.startswith("recovered") and memory["step"] % EVERY == 0:
                m = train.measure(prepared["setup"], train.PARTS["copy"](student, dtype),
                                  states["healthy"])
                points.append({"step": memory["step"], **{x: m.value(x) for x in m.items}, "cka": {
                    level: kinds["linear_debiased"][-1] for level, kinds in m.cka.items()}})
            return done
        return stop_and_measure

    train.PARTS["training"], train.prepare = measured, prepare_and_keep
    train.states_of = healthy_states
    try:
        code = train.main(argv)
    finally:
        train.PARTS["training"], train.prepare = training, prepare
        train.states_of = states_of
    if points:
        Path(prepared["c"].out, "along.json").write_text(json.dumps(points, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
