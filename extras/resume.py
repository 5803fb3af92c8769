"""A run that goes on where it was broken off, and comes to the same end, to the last bit.

    python train.py --with resume        # after an interruption: the same command once more

A finished stage is not done again. A training saves its state every --save-every steps, and when
Ctrl-C or SIGTERM asks for an end. Until the run is finished, --out/.sdft-resume/ holds run.pt (what
tells it from other runs), 00.pt … (its finished stages) and middle-0.pt (process 0's training).
"""
import contextlib
import os
import re
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch

import train
from model import GPT, GPTConfig

OPTIONS = {"save_every": (21, "steps between two saves of a training; 0: only finished stages")}


class Resume:
    """The saved state of one run, and what stands in the place of four of train's parts."""

    def __init__(self, parts):
        self.parts, self.before, self.config = parts, dict(parts), parts["config"]
        self.folder, self.stages = Path(self.config.out) / ".sdft-resume", 0
        self.in_training = self.asked = False  # asked: a signal wants the end
        self.how = f"interrupted; the same command goes on from {self.folder}"
        parts.update(begin=self.begin, stage=self.stage, training=self.training, write=self.write)
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, self.ask)

    def begin(self, c, facts):
        """ValueError, before anything is changed, if the state there is another run's."""
        modules = {x.__module__ for x in self.parts.values() if callable(x)} - {"__main__", "train"}
        this = {**facts, **vars(c), "device": c.device.split(":")[0], "with": sorted(modules),
                "processes": self.parts["processes"]}
        free, path = ("out", "save_every", "weights_rms"), self.folder / "run.pt"
        this = {name: repr(x) for name, x in this.items() if name not in free}
        then = read(path) if path.exists() else this
        differ = [name for name in sorted(this | then) if this.get(name) != then.get(name)]
        train.require(not differ, f"{c.out} holds an unfinished run with other {', '.join(differ)}:"
                      f" go on with that, choose another --out, or delete {self.folder}")
        self.before["begin"](c, facts)
        self.save(path, this)

    def stage(self, name, make):
        """What make() gave in an earlier process of this run, or gives now."""
        path, self.stages = self.folder / f"{self.stages:02}.pt", self.stages + 1
        if path.exists():
            state = read(path)
            if "weights" not in state:
                return state["asked"] if "asked" in state else train.Measurement(**state)
            with torch.device("meta"):
                student = GPT(GPTConfig(**state["config"]))
            student.load_state_dict(state["weights"], assign=True)
            return student.requires_grad_(False).eval().to(self.config.device), state["memory"]
        try:
            made = make()
        finally:
            self.in_training = False
        if isinstance(made, tuple):
            student, memory = made
            self.save(path, {"config": vars(student.config), "weights": dict(student.state_dict()),
                             "memory": memory | {"state_dict": None}})
        else:
            self.save(path, {"asked": made} if isinstance(made, dict) else vars(made))
        if self.asked:
            raise KeyboardInterrupt(self.how)
        return made

    def training(self, name, student, memory, generator, best):
        """stop() of a training, which also saves; the five are put where an earlier process was."""
        stop, began = self.before["training"](name, student, memory, generator, best), time.time()
        path, every = self.folder / f"middle-{self.parts.get('rank', 0)}.pt", self.config.save_every
        parameters = [p.detach() for p in student.parameters() if p.requires_grad]
        state = read(path) if path.exists() else {"name": ""}
        steps = self.parts["gather"]([state["name"] == name and state["memory"]["step"]])
        if min(steps) == max(steps) > 0:  # else one process was killed before its save
            for p, saved in zip(parameters, state["parameters"]):
                p.copy_(saved)
            memory.update(state["memory"])
            generator.set_state(state["generator"])
            if best:
                vars(best).update(state["best"])
            for line in memory["lines"]:
                self.parts["log"](self.config, line)
        self.in_training = True

        def save_and_stop():
            if stop and stop():
                return True
            asked = any(self.parts["gather"]([self.asked]))
            if asked or every > 0 and memory["step"] % every == 0:
                known = memory | {"state_dict": None, "optimizer": memory["state_dict"](),
                                  "seconds": memory.get("seconds", 0) + time.time() - began}
                noted = {x: y for x, y in vars(best).items() if not callable(y)} if best else {}
                self.save(path, {"name": name, "parameters": parameters, "memory": known,
                                 "generator": generator.get_state(), "best": noted})
            if asked:
                raise KeyboardInterrupt(self.how)
        return save_and_stop

    def write(self, c, results, trained, students):
        """Write the results; then nobody needs the state any more."""
        self.before["write"](c, results, trained, students)
        for path in sorted(self.folder.glob("*")):  # run.pt goes last
            if re.fullmatch(r"(\d+|middle-\d+|run)\.(pt|part)", path.name):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a file of somebody else's is in there
            self.folder.rmdir()

    def ask(self, *_):
        """Ctrl-C or SIGTERM ends a training after its step, and all else at once."""
        if not self.in_training:
            raise KeyboardInterrupt(self.how)
        self.asked = True
        print("\nthis step is finished and saved first", file=sys.stderr)

    def save(self, path, state):
        """Write a file, whole or not at all. A failure is said, and the run goes on."""
        if self.parts.get("rank", 0) and "middle" not in path.name:
            return  # process 0 writes what all know
        part = path.with_suffix(".part")
        try:
            self.folder.mkdir(exist_ok=True)
            with open(part, "wb") as file:
                torch.save(state, file)
            if path.name == "run.pt" or (self.folder / "run.pt").exists():
                os.replace(part, path)
        except (OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            print(f"\n{path} could not be saved ({why}); the run goes on", file=sys.stderr)
            part.unlink(missing_ok=True)


attach = Resume


def read(path):
    """What `save` wrote; ValueError for all else."""
    with contextlib.suppress(Exception):  # torch raises errors of many kinds
        if not zipfile.ZipFile(path).testzip():
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    raise ValueError(f"{path} is damaged: delete {path.parent}, and this run begins anew")
