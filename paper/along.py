"""CKA and performance on the way of a recovery (§5.4), measured every few steps.

    python paper/along.py --degrade nf4 --eval-limit 150 --out runs/along/0-0

The options are train.py's. This is written as a fork would write it: functions of its own in the
place of those in train.PARTS. results.json gets "along": {stage: [{"step", "values", "cka"}]}.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train

EVERY = 3  # steps between two points


def main(argv=None):
    """One run of train.py, with points; its exit code."""
    parts, seen, along = dict(train.PARTS), {}, {}

    def stage(name, make):
        """The healthy model is measured: keep what every later one is compared with."""
        if name == "healthy":
            seen["setup"], healthy = make.args
            seen["states"] = train.states_of(seen["setup"], healthy)
        return parts["stage"](name, make)

    def training(name, student, memory, generator, best):
        stop = parts["training"](name, student, memory, generator, best)

        def stop_and_measure():
            if name.startswith("recovered") and memory["step"] % EVERY == 0:
                dtype = getattr(torch, train.PARTS["config"].dtype)
                model = train.PARTS["copy"](student, dtype)
                m = train.measure(seen["setup"], model, seen["states"])
                values = {metric: m.value(metric) for metric in m.items}
                last = {level: {kind: [layers[-1]] for kind, layers in kinds.items()}
                        for level, kinds in m.cka.items()}
                point = {"step": memory["step"], "values": values, "cka": last}
                along.setdefault(name, []).append(point)
            return stop and stop()
        return stop_and_measure

    def write(c, results, trained, students):
        parts["write"](c, results | {"along": along}, trained, students)

    train.PARTS |= {"stage": stage, "training": training, "write": write}
    try:
        return train.main(argv)
    finally:
        train.PARTS |= parts


if __name__ == "__main__":
    sys.exit(main())
