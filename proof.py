"""What a run would take, before it (`train.py … --dry-run`), and whether its numbers hold, after it
(`train.py --verify DIR`)."""
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path

import torch

import evaluate
import parallel
import resume
import train
from damage import damage_
from model import GPT, frozen_copy
from prepare import parts_of, prepare

# ------------------------------------------------------------------------------------- beforehand

SAMPLE = 128  # examples of each split that are answered to see how long all take: one batch
STEPS = 3     # steps that are taken to see how long all take


def dry_run(c):
    """Read and check everything; try a part of each stage; print what the whole would take."""
    run, times = prepare(c), {}
    points = len(range(c.measure_every, c.steps, c.measure_every)) if c.measure_every else 0
    points += len(parts_of(c))
    c.measure_every, c.interpolate = 0, ""  # a point takes what the measuring of a stage does
    dtype = getattr(torch, c.dtype)
    with tempfile.TemporaryDirectory() as c.out:  # of this process alone
        run.teachers["healthy"] = run.teachers["base"]
        student, run.student = run.student, None
        times["healthy"] = time_to_measure(run, run.teachers["healthy"])
        times["training"] = 0.0
        for lesson in filter(None, (run.expert, run.forgetting)):
            student, seconds = tried(run, student, lesson)
            times["training"] += seconds
            if lesson is run.expert:
                run.teachers["healthy"] = frozen_copy(student, dtype)
        began = time.perf_counter()
        damage_(student, c, run.calibration)
        times["degraded"] = time_to_measure(run, frozen_copy(student, dtype))
        times["damage"] = time.perf_counter() - began - times["degraded"][1]
        trained = [lesson for lesson in run.recoveries if lesson.how != "none"]
        if trained:
            times["training"] += tried(run, student, trained[0])[1] * len(trained)
    times["along"] = times["degraded"][0] * points * len(trained)
    show_plan(run, times)
    return 0


def time_to_measure(run, model):
    """(seconds that measuring this model takes, how many of them were spent on a part)."""
    began, evaluation, whole = time.perf_counter(), run.evaluation, 0.0
    for metric, part in some_of(evaluation).items():
        only, n = dataclasses.replace(evaluation, splits={metric: part}, windows={}), len(part)
        whole += seconds_of(evaluate.measure, only, model) * len(evaluation.splits[metric]) / n
    rest = dataclasses.replace(evaluation, splits={})
    whole += seconds_of(evaluate.measure, rest, model, run.kept)
    if run.kept is None:
        whole += seconds_of(keep_states, run, model)
    return whole, time.perf_counter() - began


def some_of(evaluation):
    """SAMPLE examples of each split."""
    return {metric: evaluate.spread(of, SAMPLE) for metric, of in evaluation.splits.items()}


def keep_states(run, model):
    run.kept = evaluate.healthy_of(run.evaluation, model)


def seconds_of(function, *arguments):
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def tried(run, student, lesson):
    """(the student after a few steps of this training, the seconds that all of it would take, with
    the guard's checks)."""
    steps = len(lesson.batches)
    part = sorted(lesson.batches, key=tokens_in)[-STEPS:]  # the longest take the most memory
    began = time.perf_counter()
    student = train.teach(run, student, dataclasses.replace(lesson, batches=part))
    spent = time.perf_counter() - began
    if lesson.recovery:  # for the memory that it takes
        evaluate.measure(dataclasses.replace(run.evaluation, splits=some_of(run.evaluation)),
                         frozen_copy(student, getattr(torch, run.config.dtype)), run.kept)
    each = train.seconds_of_steps(run, lesson.stage) or [0.0]  # none, if the first diverged
    later = each[1:] or each  # the first step is slower
    step = sum(later) / len(later)
    watched = run.guard.get(lesson.stage, {"seconds": 0, "checks": []})
    check = watched["seconds"] / max(1, len(watched["checks"]))
    once = spent - sum(each) - watched["seconds"]
    return student, once + steps * step + check * (1 + math.ceil(steps / 7))


def tokens_in(batch):
    """Tokens of a batch's prompts, as both sides see them."""
    return sum(len(p.student) + len(p.teacher) for p in batch)


def show_plan(run, times):
    """Print the stages, and what each takes."""
    if parallel.rank():
        return
    c, evaluation = run.config, run.evaluation
    questions = sum(map(len, evaluation.splits.values()))
    windows = sum(map(len, evaluation.windows.values()))
    print(f"\nplan of a run ({c.dtype}, {parallel.processor(c.device)}):")
    lessons = [run.expert, run.forgetting, *run.recoveries]
    for lesson in [lesson for lesson in lessons if lesson and lesson.how != "none"]:
        tokens = sum(map(tokens_in, lesson.batches))
        print(f"  {lesson.stage}: {lesson.how}, {len(lesson.batches)} steps, "
              f"{sum(map(len, lesson.batches))} "
              f"prompts of {tokens:,} tokens, as student and teacher see them, and answers")
    print(f"  each stage is measured: {questions} questions, {windows} windows of text, "
          f"{sum(map(len, evaluation.sequences.values()))} sequences for CKA")
    stages = sum(lesson.how != "none" for lesson in run.recoveries)
    measuring = times["degraded"][0] * (stages + bool(run.expert) + train.is_damaged(run))
    measuring += times["healthy"][0] + times["along"]
    training = times["training"]
    total = measuring + training + times["damage"]
    size = 4 * run.facts["parameters"] / 2 ** 30  # of a student, float32
    memory = parallel.peak_memory_gib() + 2 * size * (len(run.recoveries) - 1)
    print(f"expect {total / 60:.1f} minutes (measuring {measuring:.0f} s, training "
          f"{training:.0f} s), {memory:.1f} GiB of memory", end="")
    if c.device != "cpu":
        print(f", {parallel.peak_memory_gib(c.device):.1f} GiB of the GPU", end="")
    print(f", {size * len(run.recoveries):.1f} GiB on disk; nothing was written")


# ------------------------------------------------------------------------------------- afterwards

def verify(config):
    """Measure the students that a finished run left in the folder --verify, and its healthy model,
    again, and print which numbers agree; returns 0 if all do, else 1. On the run's own device, but
    where another one was asked for, or that one is not here.

    ValueError, FileNotFoundError for a folder that is none of a finished run of this version.
    """
    folder = Path(config.verify)
    results, c = results_in(folder)
    absent = c.device.startswith("cuda") and not torch.cuda.is_available()
    if absent or config.device != train.Config().device:
        c.device = config.device
    c.shard = False
    run, good = prepare(c), True
    for name in ("model_sha256", "data_sha256", "eval_sha256", "text_sha256"):
        good &= same("what was read", name, results["environment"].get(name), run.facts[name])
    for name, now in (("processor", parallel.processor(c.device)), ("torch", torch.__version__)):
        same("the machine", name, results["environment"].get(name), now)
    models = {} if run.expert else {"healthy": run.teachers["base"]}
    for lesson in run.recoveries:
        path = resume.student_of(folder, lesson.stage)
        models[lesson.stage] = frozen_copy(GPT.from_pretrained(path), getattr(torch, c.dtype))
    for stage, model in models.items():
        progress = f"measure {stage}" if parallel.rank() == 0 else ""
        m = evaluate.measure(run.evaluation, model.to(c.device), run.kept, progress)
        if stage == "healthy":
            keep_states(run, model)
        for metric in m.items:
            good &= same(stage, metric, results["stages"][stage][metric], m.value(metric))
        for level, kinds in m.cka.items():
            for kind, values in kinds.items():
                then = results["cka"].get(level, {}).get(stage)
                if then:  # not of a student that is the healthy model itself
                    now = evaluate.finite_or_none(values[-1])
                    good &= same(stage, f"CKA, {level}, {kind}, last layer", then[kind][-1], now)
    say("all agree" if good else "not all agree")
    return 0 if good else 1


def results_in(folder):
    """(results.json, its Config) of a finished run."""
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no results.json of a finished run")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for part in ("environment", "stages", "cka"):
            results[part].keys()
        return results, train.Config(**results["config"])
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not of a run of this version ({error})") from None


def same(what, name, then, now):
    """Whether two values are one, to a millionth; printed."""
    numbers = isinstance(then, (int, float)) and isinstance(now, (int, float))
    agree = math.isclose(then, now, rel_tol=1e-6, abs_tol=1e-9) if numbers else then == now
    shown = [f"{x:.6g}" if isinstance(x, float) else str(x) for x in (then, now)]
    say(f"  {what}: {name} {shown[0]}" + (", agrees" if agree else f" then, {shown[1]} now"))
    return agree


def say(line):
    """Print it, from one process."""
    if parallel.rank() == 0:
        print(line)
