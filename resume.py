"""A run that can go on where it stopped: everything that it knows, as one dictionary of tensors,
numbers and texts, in --out/checkpoint/.

`write` and `read` are a file for such a dictionary. `save` writes the run's own, each time that
something is measured or trained, and every --save-every steps of a training; `begin` reads it. What
is not in it is computed again, to the last bit: what was read, the damage, the teachers.
"""
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

import evaluate
import parallel
from model import frozen_copy

LASTING = "asked", "guard", "lines", "seconds", "shown"  # what of a Run is in a checkpoint as it is
FREE = "out", "save_every", "resume"                     # options that change no number
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16",
          torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}


# ------------------------------------------------------------------------------- a file of a state

def write(path, state):
    """A dictionary as a safetensors file, whole or not at all: its tensors, one at a time, and all
    else as JSON in the file's metadata."""
    tensors, part = {}, path.with_suffix(".part")
    text = json.dumps(_taken_apart(state, tensors))
    header, end = {"__metadata__": {"state": text}}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape),
                        "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    try:
        with open(part, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for t in tensors.values():
                file.write(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path):
    """What `write` wrote; ValueError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            return _put_together(state, file.get_tensor)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a checkpoint of this project ({error}); --no-resume starts "
                         "anew") from None


def _taken_apart(x, tensors):
    """x without its tensors, each of which leaves its name in `tensors`, as {"tensor": name}; a
    dictionary, whatever its keys, is {"dict": it}."""
    if isinstance(x, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = (x.to_local() if isinstance(x, DTensor) else x).detach()
        return {"tensor": name}
    if isinstance(x, dict):
        return {"dict": {key: _taken_apart(value, tensors) for key, value in x.items()}}
    if isinstance(x, (list, tuple)):
        return [_taken_apart(value, tensors) for value in x]
    return x


def _put_together(x, tensor):
    """The inverse; tensor(name) is one of them."""
    if isinstance(x, dict):
        if "tensor" in x:
            return tensor(x["tensor"])
        return {key: _put_together(value, tensor) for key, value in x["dict"].items()}
    return [_put_together(value, tensor) for value in x] if isinstance(x, list) else x


# ------------------------------------------------------------------------------- a run's own state

class Finished(Exception):
    """This very run is done already."""


def begin(run):
    """Take hold of --out, and give the run what an earlier process of it left there.

    OSError if --out cannot be written to, or another process is at work there; ValueError, naming
    the options that differ, if what is unfinished there is another run; Finished.
    """
    out = Path(run.config.out)
    run.checkpoint, run.identity = out / "checkpoint", identity(run)
    if parallel.rank() == 0:
        run.lock = lock(out)
    if run.config.resume:
        go_on(run, out)
    if parallel.rank() == 0:
        clear(run, out, 4 * run.facts["parameters"] * len(run.recoveries))


def go_on(run, out):
    """Read the checkpoint, if there is one."""
    latest = run.checkpoint / "latest.json"
    if not latest.exists():
        if finished_there(out) == run.identity:
            raise Finished(f"{out} holds this run, finished: --no-resume does it again")
        return
    run.saves = json.loads(latest.read_text())["saves"]
    state = read(file_of(run))
    differ = [name for name in sorted(state["identity"].keys() | run.identity.keys())
              if state["identity"].get(name) != run.identity.get(name)]
    if differ:
        raise ValueError(f"{out} holds an unfinished run with other {', '.join(differ)}: go on "
                         "with that, choose another --out, or start anew by --no-resume")
    for name in LASTING:
        setattr(run, name, state[name])
    run.measured = {name: evaluate.Measurement(**m) for name, m in state["stages"].items()}
    run.trained, run.training = state["trained"], state["training"]


def clear(run, out, size):
    """Take away an earlier run's results, which a run that dies would leave standing. OSError if
    --out cannot be written to, or has no room for students of this many bytes."""
    try:
        (out / "results.json").unlink(missing_ok=True)
        lines = [evaluate.to_json(line) + "\n" for line in run.lines]
        (out / "metrics.jsonl").write_text("".join(lines))
        if not run.saves and run.checkpoint.exists():
            shutil.rmtree(run.checkpoint)
    except OSError as error:
        why = f"{error.strerror}; choose another folder"
        raise OSError(f"cannot write to --out {out}: {why}") from None
    free = shutil.disk_usage(out).free
    if free < size:
        raise OSError(f"--out {out}: {free / 1e9:.1f} GB are free there and the students take "
                      f"{size / 1e9:.1f}: choose another folder")


def lock(out):
    """Make a folder, and hold it for as long as this process lives; OSError if another one does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise OSError(f"another run is at work in --out {out}: choose another folder") from None
    except OSError as error:
        why = f"{error.strerror}; choose another folder"
        raise OSError(f"cannot write to --out {out}: {why}") from None
    return folder


def end(run, done):
    """Let go of --out; of a run that has left everything there, take its state away."""
    if done and parallel.rank() == 0:
        shutil.rmtree(run.checkpoint, ignore_errors=True)
    if run.lock is not None:
        os.close(run.lock)


def how_to_go_on(config, run):
    """What to say of a run that was broken off."""
    if run and run.checkpoint and (run.checkpoint / "latest.json").exists():
        return f"the same command goes on from {run.checkpoint}"
    return f"{config.out}/results.json and student/ were not written"


def identity(run):
    """Everything that decides a run's numbers, by the names that a user knows."""
    facts = run.facts | {"processes": parallel.size(), "torch": torch.__version__}
    return _identity(dataclasses.asdict(run.config), facts)


def finished_there(out):
    """The identity of the run whose results a folder holds; None if there are none."""
    try:
        results = json.loads((out / "results.json").read_text())
        return _identity(results["config"], results["environment"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(config, facts):
    config = config | {"device": config["device"].split(":")[0]}
    options = {"--" + name.replace("_", "-"): value
               for name, value in config.items() if name not in FREE}
    hashes = "data_sha256", "eval_sha256", "text_sha256"
    return options | {name: facts[name] for name in (*hashes, "processes", "torch")}


def file_of(run):
    """Where this process's state is: its own, of a sharded student, else that of process 0."""
    share = parallel.rank() if run.config.shard else 0
    return run.checkpoint / f"{run.saves}-{share}.safetensors"


def save(run, training=None):
    """Write the run's state beside the one that was there, then in place of it. A full disk is
    said, and ends nothing."""
    if not run.config.save_every or not run.checkpoint:
        return
    state = {name: getattr(run, name) for name in LASTING} | {
        "identity": run.identity, "trained": run.trained, "training": training,
        "stages": {name: vars(m) for name, m in run.stages.items()}}
    old, first = file_of(run), parallel.rank() == 0
    run.saves += 1
    with said(run):
        run.checkpoint.mkdir(exist_ok=True)
        if first or run.config.shard:
            write(file_of(run), state)
        parallel.wait()
        if first:
            part = run.checkpoint / "latest.part"
            part.write_text(json.dumps({"saves": run.saves}))
            os.replace(part, run.checkpoint / "latest.json")
        parallel.wait()
        old.unlink(missing_ok=True)


@contextlib.contextmanager
def said(run):
    """Within the body an OSError is one line, no more."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        print(f"\n{run.checkpoint}: a checkpoint could not be written ({why})", file=sys.stderr)


# ------------------------------------------------------------------------------------- its students

def keep(run, stage, student):
    """Save a student whose training is over."""
    if not run.config.save_every or not run.checkpoint:
        return
    with said(run):
        if parallel.rank() == 0:
            run.checkpoint.mkdir(exist_ok=True)
            weights = dict(student.named_weights())
            write(run.checkpoint / f"{stage}.safetensors", {"weights": weights})
        run.trained.append(stage)
        save(run)


def trained(run, student, stage):
    """The student that `keep` saved, from one of its shape, which is not yet trained."""
    weights = read(run.checkpoint / f"{stage}.safetensors")["weights"]
    plain = frozen_copy(student, torch.float32)
    plain.load_state_dict({name: w.to(plain.device) for name, w in weights.items()}, assign=True)
    return plain.requires_grad_(False)


def trained_parameters(student):
    return [p for p in student.parameters() if p.requires_grad]


def snapshot(stage, student, memory, generator, watch, first):
    """A training's state, between two steps: all that `resumed` needs."""
    return {"stage": stage, "parameters": trained_parameters(student), "memory": memory,
            "generator": generator.get_state(), "watch": watch and watch.state(), "first": first}


@torch.no_grad()
def resumed(run, student, stage):
    """The snapshot of this training if there is one, else {}; the student has its weights then."""
    found = run.training
    if not found or found["stage"] != stage:
        return {}
    parameters = trained_parameters(student)
    for p, saved in zip(parameters, found["parameters"]):
        (p.to_local() if isinstance(p, DTensor) else p).copy_(saved)
    memory = found["memory"]
    memory["moments"] = [{name: _beside(p, x) for name, x in moments.items()}
                         for p, moments in zip(parameters, memory["moments"])]
    if "phi" in memory:
        memory["phi"] = {name: w.to(student.device) for name, w in memory["phi"].items()}
    run.training = None
    return found


def _beside(p, x):
    """A moment, where its parameter p is, and cut into shares as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    x = x.to(p.device)
    if isinstance(p, DTensor) and x.dim():
        return DTensor.from_local(x, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
    return x


class Interrupt:
    """Ctrl-C or SIGTERM: KeyboardInterrupt at once; while a step is `held`, when it is done."""

    held = asked = False

    def __call__(self, *_):
        if not self.held or self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def caught(self):
        """Within the body, also where a shell has had them ignored; not under torchrun, which has
        ways of its own."""
        ours = parallel.size() == 1 and threading.current_thread() is threading.main_thread()
        which = (signal.SIGINT, signal.SIGTERM) if ours else ()
        before = {number: signal.signal(number, self) for number in which}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def whole_steps(self, held):
        """Within the body, if held, a step is not broken off; the body asks whether it is time."""
        self.held = held
        try:
            yield
        finally:
            self.held = False

    def leave_if_asked(self):
        if self.asked:
            raise KeyboardInterrupt
