"""A run that can go on where it stopped: everything that it knows, as one dictionary of tensors,
numbers and texts, in --out/checkpoint/.

`write` and `read` are a file for such a dictionary. `save` writes the run's own, each time that
something is measured or trained, and every --save-every steps of a training; `begin` reads it. What
is not in it is computed again, to the last bit: what was read, the damage, the teachers.
"""
import contextlib
import dataclasses
import fcntl
import hashlib
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
from files import FORMS, printable, read_json, whole
from model import frozen_copy

LASTING = "along", "asked", "guard", "lines", "machine", "seconds", "shown"  # of a Run, as they are
LATEST = "latest.json"                                   # names the last whole state
FREE = "out", "save_every", "resume", "dry_run", "verify"  # options that change no number
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16",
          torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}


# ------------------------------------------------------------------------------- a file of a state

def write(path, state):
    """A dictionary as a safetensors file, whole or not at all: its tensors, one at a time, and all
    else as JSON in the file's metadata."""
    tensors = {}
    text = json.dumps(_taken_apart(state, tensors))
    header, end = {}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape),
                        "data_offsets": [begin, end]}
    forms = {name: (h["dtype"], h["shape"]) for name, h in header.items()}
    header["__metadata__"] = {"state": text, "sha256": _sha256(text, forms)}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with whole(path) as part, open(part, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for t in tensors.values():
            file.write(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


class Broken(OSError, ValueError):
    """What is no checkpoint of this project, or has changed since it was written."""

    def __init__(self, path, why):
        super().__init__(f"{path}: not a checkpoint of this project ({printable(str(why))}); "
                         "--no-resume starts anew")


def read(path):
    """What `write` wrote; Broken for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            said, parts = file.metadata(), {name: file.get_slice(name) for name in file.keys()}
            forms = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
            if said["sha256"] != _sha256(said["state"], forms):
                raise ValueError("it has changed since it was written")
            return _put_together(json.loads(said["state"]), file.get_tensor)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise Broken(path, error) from None


def _sha256(text, forms):
    """Of a state without its tensors' values; forms: {name: (dtype, shape)} of these."""
    whole = text + json.dumps(forms, sort_keys=True)
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()


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
    """This very run is done already; code is what it ended with."""

    def __init__(self, out, code):
        super().__init__(f"{out} holds this run, finished: --no-resume does it again")
        self.code = code


def begin(run):
    """Take hold of --out, and give the run what an earlier process of it left there.

    OSError if --out cannot be written to, or another process is at work there; ValueError, naming
    the options that differ, if what is unfinished there is another run; Finished.
    """
    out = Path(run.config.out)
    run.checkpoint, run.identity = out / "checkpoint", identity(run)
    run.machine = machine(run.config)
    try:
        if parallel.rank() == 0:
            run.lock = lock(out)
        if run.config.resume:
            go_on(run, out)
        if parallel.rank() == 0:
            clear(run, out)
    except BaseException:
        end(run, done=False)
        raise


def go_on(run, out):
    """Read the checkpoint, if there is one."""
    if not (run.checkpoint / LATEST).exists():
        check_finished(run, out)
        return
    run.saves = _saves(run.checkpoint / LATEST)
    state = _whole(file_of(run, run.saves))
    differ = [name for name in sorted(state["identity"].keys() | run.identity.keys())
              if state["identity"].get(name) != run.identity.get(name)]
    if differ:
        raise ValueError(f"{out} holds an unfinished run with other {', '.join(differ)}: go on "
                         "with that, choose another --out, or start anew by --no-resume")
    warn_of_another_machine(run, out, state["machine"])
    for name in LASTING:
        setattr(run, name, state[name])
    run.measured = {name: evaluate.Measurement(**m) for name, m in state["stages"].items()}
    run.trained, run.training = state["trained"], state["training"]
    known = {*run.trained, (run.training or {}).get("stage")}
    run.lines = [line for line in run.lines if line["stage"] in known]
    run.along = {stage: points for stage, points in run.along.items() if stage in known}
    run.seconds = {name: spent for name, spent in run.seconds.items()
                   if name.removesuffix(" training") in known or not name.endswith(" training")}


def warn_of_another_machine(run, out, then):
    """A line on stderr, if the run was begun on one: to refuse would be to throw away its work."""
    now = run.machine
    others = [f"{name} {then.get(name)}, now {now[name]}"
              for name in now if now[name] != then.get(name)]
    if others and parallel.rank() == 0:
        print(printable(f"{out} was begun with {', '.join(others)}: it goes on, and its numbers "
                        "may be others in their last digits"), file=sys.stderr)


def _saves(latest):
    """The number of the checkpoint that latest.json names."""
    try:
        saves = read_json(latest).get("saves")
    except ValueError as error:
        raise Broken(latest, error) from None
    if type(saves) is not int or saves < 1:
        raise Broken(latest, "it names no checkpoint")
    return saves


FORM = {"identity": dict, "machine": dict, "along": dict, "asked": dict, "guard": dict,
        "lines": list, "seconds": dict, "shown": dict, "stages": dict, "trained": list,
        "training": dict | None}


def _whole(path):
    """The state of a run in a file; Broken if it is that of something else."""
    state = read(path)
    wrong = [name for name, form in FORM.items()
             if not isinstance(state, dict) or not isinstance(state.get(name, ...), form)]
    fields = {field.name for field in dataclasses.fields(evaluate.Measurement)}
    if wrong or not all(isinstance(m, dict) and m.keys() == fields
                        for m in state["stages"].values()):
        raise Broken(path, f"it is not the state of a run: {', '.join(wrong) or 'stages'}")
    return state


def check_finished(run, out):
    """Finished, if a folder holds all that this run would leave."""
    try:
        results = read_json(out / "results.json")
        same = identity_of(results["config"], results["environment"]) == run.identity
        code = int(any(found["ended"] for found in results["guard"].values()))
    except (OSError, ValueError, *FORMS):  # another version's, or not ours
        return
    weights = [student_of(out, lesson.stage) / "model.safetensors" for lesson in run.recoveries]
    if same and all(path.exists() for path in weights):
        raise Finished(out, code)


def student_of(out, stage):
    """The folder that a recovery leaves its student in.

    >>> str(student_of(Path("out"), "recovered_kd"))
    'out/student_kd'
    """
    return out / stage.replace("recovered", "student")


@contextlib.contextmanager
def writing_to(out):
    """OSError in the body becomes one that names --out; but not that of a lock that is held."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        why = f"{error.strerror}; choose another folder"
        raise OSError(f"cannot write to --out {out}: {why}") from None


def clear(run, out):
    """Take away an earlier run's results, which a run that dies would leave standing. OSError if
    --out cannot be written to, or has no room for the students."""
    size, free = 4 * run.facts["parameters"] * len(run.recoveries), shutil.disk_usage(out).free
    if free < size:
        raise OSError(f"--out {out}: {free / 1e9:.1f} GB are free there and the students take "
                      f"{size / 1e9:.1f}: choose another folder")
    with writing_to(out):
        (out / "results.json").unlink(missing_ok=True)
        write_lines(run, out)
        if not run.saves:
            remove(run.checkpoint)


def write_lines(run, out):
    """metrics.jsonl, unless it is as it should be."""
    path = out / "metrics.jsonl"
    text = "".join(evaluate.to_json(line) + "\n" for line in run.lines).encode()
    if not path.exists() or path.read_bytes() != text:
        with whole(path) as part:
            part.write_bytes(text)


def remove(checkpoint):
    """A checkpoint folder, if there is one; what says that it is one goes first."""
    (checkpoint / LATEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def lock(out):
    """Make a folder, and hold it for as long as this process lives; OSError if another one does."""
    try:
        with writing_to(out):
            out.mkdir(parents=True, exist_ok=True)
            folder = os.open(out, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise OSError(f"another run is at work in --out {out}: choose another folder") from None
    return folder


def end(run, done):
    """Let go of --out; of a run that has left everything there, take its state away."""
    if done and parallel.rank() == 0:
        remove(run.checkpoint)
    if run.lock is not None:
        os.close(run.lock)
        run.lock = None


def how_to_go_on(config):
    """What to say of a run that was broken off."""
    checkpoint = Path(config.out) / "checkpoint"
    if (checkpoint / LATEST).exists():
        but = "" if config.resume else " without --no-resume"
        return f"the same command{but} goes on from {checkpoint}"
    return f"{config.out}/results.json and student/ were not written"


def identity(run):
    """Everything that decides a run's numbers but for their last digits, by the names that a user
    knows."""
    facts = run.facts | {"processes": parallel.size()}
    return identity_of(dataclasses.asdict(run.config), facts)


def machine(config):
    """What may change the last digits: other sums of float32, or the same in another order."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(),
            "processor": parallel.processor(config.device)}


def identity_of(config, facts):
    config = config | {"device": config["device"].split(":")[0]}
    options = {"--" + name.replace("_", "-"): value
               for name, value in config.items() if name not in FREE}
    hashes = "model_sha256", "data_sha256", "eval_sha256", "text_sha256", "inputs_sha256"
    return options | {name: facts[name] for name in (*hashes, "processes")}


def file_of(run, number):
    """Where this process's state is: its own, of a sharded student, else that of process 0."""
    share = parallel.rank() if run.config.shard else 0
    return run.checkpoint / f"{number}-{share}.safetensors"


def save(run, training=None):
    """Write the run's state beside the one that was there, then in place of it."""
    if not saving(run):
        return
    state = {name: getattr(run, name) for name in LASTING} | {
        "identity": run.identity, "trained": run.trained, "training": training,
        "stages": {name: vars(m) for name, m in run.stages.items()}}
    ours, latest = file_of(run, run.saves + 1), run.checkpoint / LATEST
    if not written(run, ours, write, state, whose="each" if run.config.shard else "first"):
        return
    run.saves += written(run, latest, write_latest, run.saves + 1, whose="first")
    for path in run.checkpoint.glob(f"*-{ours.stem.split('-')[1]}.safetensors"):
        if path != file_of(run, run.saves) and (run.config.shard or parallel.rank() == 0):
            path.unlink(missing_ok=True)


def write_latest(path, saves):
    with whole(path) as part:
        part.write_text(json.dumps({"saves": saves}))


def saving(run):
    return run.config.save_every and run.checkpoint and not run.full


def written(run, path, writer, what, whose):
    """Whether all processes that are to ("first": process 0) could write their file, by
    writer(path, what). If not, that is said, the run writes no further checkpoint, and the last one
    stays. None goes on before all are done."""
    why = ""
    try:
        if whose == "each" or parallel.rank() == 0:
            run.checkpoint.mkdir(exist_ok=True)
            writer(path, what)
    except OSError as error:
        why = str(error.strerror or error)
        print(f"\n{path}: no checkpoint could be written ({why}), and none will be",
              file=sys.stderr)
    run.full = any(parallel.gather([why]))
    return not run.full


# ------------------------------------------------------------------------------------- its students

def keep(run, stage, student):
    """Save a student whose training is over."""
    if not saving(run):
        return
    state = {"weights": dict(student.named_weights())}
    if written(run, run.checkpoint / f"{stage}.safetensors", write, state, whose="first"):
        run.trained.append(stage)
        save(run)


def kept(run, student, stage):
    """The student that `keep` saved, from one of its shape, which is not yet trained."""
    path = run.checkpoint / f"{stage}.safetensors"
    weights, plain = read(path), frozen_copy(student, torch.float32)
    shapes = {name: w.shape for name, w in plain.state_dict().items()}
    weights = weights.get("weights") if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or shapes != {k: getattr(w, "shape", 0)
                                                   for k, w in weights.items()}:
        raise Broken(path, "it is not this student")
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
    for p, saved in zip(parameters, found.pop("parameters")):
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
    """Ctrl-C or SIGTERM: KeyboardInterrupt at once; where something is `held`, when that is done,
    or when asked again."""

    held, asked = "", False  # what is done first, in words

    def __call__(self, *_):
        if not self.held or self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(f"\n{self.held} first", file=sys.stderr)

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

    def leave_if_asked(self):
        if self.asked:
            raise KeyboardInterrupt
