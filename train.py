"""Damage a language model, watch it get worse, let its healthy checkpoint teach it back.

    python train.py --degrade int4                  # SmolLM2-135M-Instruct, fetched once
    python train.py --degrade ffn10,nf4 --model DIR # a folder, a GGUF file or a name

The story, top to bottom: `prepare` reads everything and finds a user's mistakes; `make_healthy` and
`make_degraded` make and measure the two models of those names; `execute` then recovers the damaged
one, in each way that was asked for; `finish` writes what came of it to --out.

Where this departs from the paper, or fills in what it leaves open, is listed in README.
"""
import argparse
import contextlib
import dataclasses
import datetime
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import checkpoint
import evaluate
import guard
import parallel
import quant
import resume
import sdft
from damage import damage_, parse_damage
from data import DEMOS
from files import whole
from model import frozen_copy, own_copy
from prepare import parts_of, prepare

# ------------------------------------------------------------------------------ the configuration

def option(default, help, **extra):
    """A Config field: its default, the line that --help shows; group, bounds, and argparse's own.

    group: of this and the fields that follow. Bounds: least and most are allowed, above and below
    are not.
    """
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@dataclass
class Config:
    """The whole configuration of a run; every field is a command-line option of the same name."""

    model: str = option("", "folder, GGUF file or name of the healthy model (default: "
                        "SmolLM2-135M-Instruct, fetched once)", group="run")
    data: str = option("science,text", "prompts to recover on: science, tooluse, text, or files "
                       "(.jsonl, text), by commas")
    seed: int = option(0, "of the order of the data and of the rollouts", least=0, below=2 ** 63)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    dtype: str = option("auto", "of computation; what is trained is float32 (auto: bfloat16 where "
                        "the processor is made for it)", choices=["auto", "float32", "bfloat16"])
    out: str = option("out", "folder for results.json, metrics.jsonl, student/ and report.png")
    save_every: int = option(21, "steps of a training between two checkpoints, with which the same "
                             "command goes on after an interruption; 0: there are none", least=0)
    resume: bool = option(True, "go on with the unfinished run that is in --out, or start anew")
    dry_run: bool = option(False, "check everything, try a part of it, say what all would take")
    verify: str = option("", "the --out of a finished run: measure its students again, no more")

    degrade: str = option(
        "", "by commas: ffn10 (percent of the neurons removed), magnitude30, wanda30 (percent of "
        "the weights held at zero), magnitude2:4, wanda2:4, int2 … int8, nf4, nvfp4, mxfp4; or "
        "none [int4; none with --student, --forget or --bootstrap]", group="damage (§5.2)")
    student: str = option("", "folder of a damaged model of one's own, to be recovered")
    group_size: int = option(64, "inputs that share a quantization scale; 0: one scale per output "
                             "channel", least=0)
    symmetric: bool = option(True, "symmetric grid around 0, or an integer zero point")
    double_quant: bool = option(False, "nf4: quantize the scales too")
    importance: str = option("activation", "what ffn removes least of",
                             choices=["activation", "weight"])
    calibration: int = option(64, "training examples that activations are taken from", least=1)

    forget: str = option(
        "", "a task, or several: SDFT on --data makes an expert, the healthy model, which is then "
        "fine-tuned on these (§5.1)", group="history: forgetting (§5.1), bootstrap (§5.3)")
    forget_steps: int = option(20, "steps of that fine-tuning", least=1)
    forget_lr: float = option(0.0, "its peak learning rate, meant as --lr; 0: 1.56e-3 of the "
                              "weights' root mean square (--lora: ten times that)", least=0)
    bootstrap: str = option("", "folder of a larger model that first teaches the healthy one, "
                            "off-policy (§5.3)")
    expert_steps: int = option(25, "steps that make the healthy model, with --forget or "
                               "--bootstrap", least=1)

    recover: str = option(
        "sdft", "sdft; or a baseline: kd (the teacher scores the expert's answers, not the "
        "student's), sft (the expert's answers alone), own (sft on the teacher's own answers), "
        "none; several, by commas: each from the same damage", group="recovery (§3)")
    teacher: str = option("healthy", "healthy (as before the damage: with --forget, the expert), "
                          "base (--model), or a folder; several, by commas: each from the same "
                          "damage")
    demo: str = option("turn", "how the teacher of a recovery sees the expert demonstration: as an "
                       "earlier turn, quoted after the question, or not", choices=DEMOS)
    teacher_check: int = option(48, "training prompts of each task that a teacher is asked before "
                                "it teaches, as it will see them and bare", least=0)
    loss: str = option("forward_kl", "divergence between teacher and student", choices=sdft.LOSSES)
    skip_tokens: int = option(0, "tokens at the beginning of each answer that the loss of sdft and "
                              "kd leaves out (Shenfeld et al.: 3)", least=0)
    anchor: float = option(0.0, "sft: weight in its loss of KL(healthy || student), both seeing "
                           "the bare prompt", least=0)
    ema: float = option(0.0, "how far the teacher follows the student each step (Shenfeld et al.: "
                        "0.01); 0: it stays as it is", least=0, below=1)
    rollout_tokens: int = option(32, "longest rollout", least=1)
    text_prompt_tokens: int = option(48, "tokens of a text prompt, at most half of the text",
                                     least=1)
    temperature: float = option(0.6, "of the rollouts", least=0)
    top_p: float = option(1.0, "nucleus of the rollouts", above=0, most=1)

    steps: int = option(25, "optimizer steps", least=1, group="optimizer (AdamW)")
    batch_size: int = option(16, "prompts a step, one rollout each, shared evenly by the tasks",
                             least=1)
    lr: float = option(0.0, "peak learning rate: of vectors, and on average of matrices, in "
                       "proportion to their size (--lora: of all); 0: by --lr-fraction", least=0)
    lr_fraction: float = option(5.2e-4, "the same, as a fraction of the root mean square of the "
                                "blocks' weights (--lora: ten times that)", above=0)
    warmup: int = option(2, "steps of linear warm-up; the second half of the steps decays to 0",
                         least=0)
    weight_decay: float = option(0.0, "of AdamW", least=0)
    clip: float = option(1.0, "largest norm of the gradient", above=0)
    train_embeddings: bool = option(False, "train embeddings and head too, which the damage left")
    lora: int = option(0, "rank of a low-rank update of frozen weights, merged when saved; 0: all "
                       "weights are trained", least=0)
    lora_alpha: float = option(32.0, "the update is scaled by alpha / rank")

    watch: str = option("loss", "what is measured every seven steps of a training: the loss on 16 "
                        "held-out prompts a task, or 1 - CKA with the healthy model over training "
                        "examples (§6)", choices=["loss", "cka"], group="guard")
    keep: str = option("best", "the weights of the best of these checks, that before the first "
                       "step among them; or of the last step", choices=["best", "last"])
    patience: int = option(0, "end a training after so many checks without a better one; 0: never",
                           least=0)

    cka_samples: int = option(64, "evaluation sequences that CKA is taken over", least=4,
                              group="CKA (§4, §6)")
    cka_weight: float = option(0.0, "of 1 - CKA of student and teacher in the loss (§6)", least=0)
    cka_balance: bool = option(False, "that weight times KL / (1 - CKA), as CKA-QAD does")

    eval: str = option("", "further tasks, or whole .jsonl files, to measure only, by commas",
                       group="measuring")
    text: str = option("python", "texts to measure perplexity on, by commas: python (the held-out "
                       "part of its documentation), or UTF-8 files")
    eval_tokens: int = option(0, "longest answer in an evaluation; 0: that of its split's longest "
                              "demonstration", least=0)
    eval_limit: int = option(0, "examples of each evaluation split; 0: all", least=0)
    measure_every: int = option(0, "steps of a recovery between two measurements on its way; 0: it "
                                "is measured at its end alone", least=0)
    interpolate: str = option("", "after a recovery measure also the weights at these parts of the "
                              "way from its start to its end, such as 0.25,0.5 (2109.01903)")

    micro_batch: int = option(16, "prompts that go through the models together", least=1,
                              group="memory and speed")
    gradient_checkpointing: bool = option(False, "compute activations again in backward: less "
                                          "memory, more time")
    adam_dtype: str = option("float32", "what AdamW's two moments are kept in",
                             choices=["float32", "bfloat16"])
    shard: bool = option(False, "under torchrun: cut parameters, gradients and optimizer states "
                         "into shares (FSDP2)")
    plain: bool = option(False, "do without fast.py")


RENAMED = {  # options of earlier versions
    "--max-new-tokens": "--rollout-tokens", "--answer-tokens": "--eval-tokens",
    "--text-tokens": "--text-prompt-tokens", "--moments": "--adam-dtype",
    "--checkpointing": "--gradient-checkpointing",
    "--no-checkpointing": "--no-gradient-checkpointing", "--stop-after": "--watch cka --patience",
    "--cka-patience": "--watch cka --patience", "--no-demo": "--demo none",
    "--train": "--lora RANK", "--lora-rank": "--lora RANK", "--forget-data": "--forget TASK",
    "--report": "python experiments.py report DIR"}


def flag(name):
    """The option of a Config field."""
    return "--" + name.replace("_", "-")


def parse(argv=None):
    """The command line as a Config; SystemExit, after one line, for options that there are not."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(complain(f"{message} (--help lists the options)", 2))
    for word in argv:
        if word.split("=")[0] in RENAMED:
            parser.error(f"{word.split('=')[0]} is now {RENAMED[word.split('=')[0]]}")
    group = parser
    for f in dataclasses.fields(Config):
        said = dict(f.metadata)
        if "group" in said:
            group = parser.add_argument_group(said.pop("group"))
        for bound in ("least", "most", "above", "below"):
            said.pop(bound, None)
        default = f" [{f.default}]" if f.default != "" else ""
        said["help"] = (said["help"] + default).replace("%", "%%")
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        group.add_argument(flag(f.name), default=f.default, **kind, **said)
    return Config(**vars(parser.parse_args(argv)))


def check_bounds(c):
    """ValueError for an option that is outside the bounds in its field."""
    words = {"least": ("at least", lambda x, bound: x >= bound),
             "above": ("more than", lambda x, bound: x > bound),
             "most": ("at most", lambda x, bound: x <= bound),
             "below": ("less than", lambda x, bound: x < bound)}
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        if f.type is float and not math.isfinite(value):
            raise ValueError(f"{flag(f.name)} must be a finite number, not {value}")
        asked = {word: bound for word, bound in f.metadata.items() if word in words}
        if not all(words[word][1](value, bound) for word, bound in asked.items()):
            needs = " and ".join(f"{words[word][0]} {bound}" for word, bound in asked.items())
            raise ValueError(f"{flag(f.name)} must be {needs}, not {value}")


# -------------------------------------------------------------------------------------- the story

def execute(run):
    """The whole story; returns results.json's content and the recovered students, by stage."""
    c, dtype, students = run.config, getattr(torch, run.config.dtype), {}
    student = make_degraded(run, make_healthy(run))
    for lesson in run.recoveries:                                 # §3
        if lesson is run.recoveries[-1]:
            recovered = student.to(c.device)
        else:                                                     # who waits does so beside the CPU
            recovered = own_copy(student.cpu()).to(c.device)
        if lesson.how == "none":
            run.stages[lesson.stage] = run.stages["degraded"]
        else:
            recovered = teach(run, recovered, lesson)
            measure(run, lesson.stage, frozen_copy(recovered, dtype))
        students[lesson.stage] = recovered.cpu() if parallel.rank() == 0 else None
    return results_of(run), students


def make_healthy(run):
    """The student before the damage: the model as it is, or an expert made of it (§5.1, §5.3).

    The healthy model, a frozen copy, is measured and may teach from now on.
    """
    student, run.student = run.student, None  # it is not kept as it is now
    healthy = run.teachers["base"]
    if run.expert:  # a Lesson, see prepare.plan_history
        measure(run, "base", healthy)
        student = teach(run, student, run.expert)
        healthy = frozen_copy(student, getattr(torch, run.config.dtype))
    measure(run, "healthy", healthy)
    run.teachers["healthy"] = healthy
    return student


def make_degraded(run, student):
    """The student after it forgot (§5.1), or was compressed (§5.2), or both."""
    c = run.config
    if run.forgetting:
        student = teach(run, student, run.forgetting)
    run.facts["damage"] = damage_(student, c, run.calibration)
    if is_damaged(run):
        measure(run, "degraded", frozen_copy(student, getattr(torch, c.dtype)))
    else:
        run.stages["degraded"] = run.stages["healthy"]
    return student


def is_damaged(run):
    """Whether the student begins its recoveries as another than the healthy model."""
    return bool(run.forgetting or run.config.student or parse_damage(run.config.degrade))


def measure(run, stage, model):
    """Measure a model under this name; of the healthy one keep what CKA compares with."""
    progress, known = f"measure {stage}" if parallel.rank() == 0 else "", stage in run.measured
    with timed(run.seconds, stage):
        if known:  # by an earlier process of this run
            run.stages[stage] = run.measured[stage]
        else:
            run.stages[stage] = evaluate.measure(run.evaluation, model, run.kept, progress)
        if stage == "healthy":
            run.kept = evaluate.healthy_of(run.evaluation, model)
    if not known:
        resume.save(run)


def teach(run, student, lesson):
    """The student, trained as the lesson says, as a plain float32 model: the best of its weights,
    by what is watched on the way."""
    c, stage = run.config, lesson.stage
    if stage in run.trained:  # by an earlier process of this run
        return resume.kept(run, student, stage)
    student = trainable_(c, student, run.teachers["base"])
    start = copies_of(student) if parts_of(c) and lesson.recovery else []
    past = resume.resumed(run, student, stage)
    ask_teacher(run, lesson)
    teacher, generator = teacher_of(run, lesson), torch.Generator()
    memory = past.get("memory", {"step": 0})
    generator.set_state(past["generator"]) if past else generator.manual_seed(c.seed)
    with timed(run.seconds, f"{stage} training") as so_far, log_of(run, stage) as log:
        watch = watch_of(run, student, lesson, past.get("watch"))
        first = past["first"] if past else show_step(run, student, teacher, lesson)
        now = partial(resume.snapshot, stage, student, memory, generator, watch, first)
        stop = stop_of(run, student, lesson, watch, memory, now, so_far)
        settings = settings_of(run, lesson, memory, log, stop)
        run.interrupt.held = "this step is finished and saved" if c.save_every else ""
        try:
            learn(run, student, teacher, lesson, settings, generator)
        except sdft.Diverged as error:
            if not watch:
                raise
            prompt = run.evaluation.tokenizer.decode(error.batch[0].student)[-60:]
            watch.ended = f"{error} (learning rate {error.lr:.3g}, prompts from {prompt!r} on)"
        if watch:
            keep_best(run, watch, lesson)
        if first:
            last = show_step(run, student, teacher, lesson)
            run.shown[stage] = {"first": first, "last": last}
    interpolate(run, student, start, lesson)
    student = parallel.plain_copy(student, torch.float32)
    resume.keep(run, stage, student)
    run.interrupt.held = ""
    run.interrupt.leave_if_asked()
    return student


def stop_of(run, student, lesson, watch, memory, now, so_far):
    """stop() of a training, after a step: whether it was the last. Now and then the student is
    measured on its way; and now(), the training's state, is saved, and when the run is asked to
    stop, which it then does. After the last step resume.keep saves the student itself."""
    def stop():
        """True if the watch ends the training here; KeyboardInterrupt, the state saved, if the run
        was asked to stop."""
        step, every, often = memory["step"], run.config.save_every, run.config.measure_every
        if lesson.recovery and often and step % often == 0 and step < len(lesson.batches):
            measure_along(run, student, lesson, step)
        if watch and watch():
            return True
        if run.interrupt.asked or (every and step % every == 0 and step < len(lesson.batches)):
            run.seconds[f"{lesson.stage} training"] = so_far()
            resume.save(run, now())
        run.interrupt.leave_if_asked()
    return stop


def measure_along(run, student, lesson, step, part=None):
    """Measure the student on its way: after a step of its training, or at a part of the way from
    its start to its end. seconds: what the steps up to here took."""
    model = parallel.plain_copy(student, getattr(torch, run.config.dtype))
    m = evaluate.measure(run.evaluation, model, run.kept)
    where = {"step": step, "part": part, "seconds": sum(seconds_of_steps(run, lesson.stage))}
    run.along.setdefault(lesson.stage, []).append(where | evaluate.point(m))


@torch.no_grad()
def interpolate(run, student, start, lesson):
    """Measure the weights between a training's start and its end; the student stays at its end."""
    if not start:  # it was not asked for
        return
    parameters, end = resume.trained_parameters(student), copies_of(student)
    names = [name for name, p in student.named_parameters() if p.requires_grad]
    if run.config.lora:  # of B A, B = 0 at the start, B alone goes: then the weights go straight
        start = [z if name.endswith(".a") else a for name, a, z in zip(names, start, end)]
    for part in map(float, parts_of(run.config)):
        for p, first, last in zip(parameters, start, end):
            p.copy_(first.lerp(last, part))
        measure_along(run, student, lesson, len(lesson.batches), part)
    for p, last in zip(parameters, end):
        p.copy_(last)


def copies_of(student):
    return [p.detach().clone() for p in resume.trained_parameters(student)]


def settings_of(run, lesson, memory, log, stop):
    """What sdft.recover and sdft.sft are told beside student, teacher and prompts."""
    c = run.config
    settings = dict(
        lr=lesson.lr, weights_rms=0 if c.lora else run.facts["weights_rms"], warmup=c.warmup,
        weight_decay=c.weight_decay, clip=c.clip, stop=stop, memory=memory,
        adam_dtype=getattr(torch, c.adam_dtype), micro_batch=c.micro_batch, log=log,
        progress=lesson.stage if parallel.rank() == 0 else "", score=run.score,
        share=parallel.share, reduce=parallel.reduce_, cached=not c.shard)
    if lesson.recovery and lesson.how == "sft" and c.anchor:
        settings |= dict(anchor=run.teachers["healthy"], anchor_weight=c.anchor)
    if lesson.recovery and lesson.how in ("sdft", "kd"):
        settings |= dict(skip=c.skip_tokens, ema=c.ema, cka_weight=c.cka_weight,
                         cka_balance=c.cka_balance)
    return settings


def learn(run, student, teacher, lesson, settings, generator):
    """The training itself, by sdft.py."""
    if lesson.how in ("sft", "own"):
        own = partial(own_answers, run, teacher) if lesson.how == "own" else None
        sdft.sft(student, lesson.batches, answer=own, **settings)
    else:
        rollout = rollout_of(run, generator) if lesson.how == "sdft" else None
        sdft.recover(student, teacher, lesson.batches, rollout, loss=sdft.LOSSES[lesson.loss],
                     backward=run.backward, **settings)


def own_answers(run, teacher, batch):
    """The teacher's own greedy answers to a batch, the demonstration before it, made in shares on
    all processes."""
    return parallel.gather(run.generate(
        teacher, [p.teacher for p in parallel.share(batch)], run.config.rollout_tokens, 0, 1.0,
        run.evaluation.tokenizer.eos_ids, batch_size=64))


def ask_teacher(run, lesson):
    """Whether a teacher knows what it is about to teach; each is asked once."""
    name = lesson.teacher
    if lesson.recovery and name and run.samples and name not in run.asked:
        with timed(run.seconds, f"asking {name}"):
            run.asked[name] = guard.check_teacher(run.evaluation, run.teachers[name], run.samples,
                                                  run.config.demo)


def keep_best(run, watch, lesson):
    """Put the best weights back; what was seen, for the report, and a line if it went wrong."""
    watch.restore(run.config.keep)
    run.guard[lesson.stage] = {"watch": run.config.watch if lesson.recovery else "loss",
                               "steps": watch.steps, "checks": watch.checks, "kept": watch.kept,
                               "ended": watch.ended, "seconds": watch.seconds}
    if watch.ended and parallel.rank() == 0:
        print(f"\nerror: {lesson.stage}: {watch.ended}; the peak learning rate was "
              f"{lesson.lr:.3g}: went back to step {watch.kept}; try a tenth of it by --lr",
              file=sys.stderr)


def teacher_of(run, lesson):
    """Who scores, or None; a copy of it where it will follow the student."""
    teacher = run.teachers.get(lesson.teacher)
    if lesson.recovery and teacher and run.config.ema:
        teacher = frozen_copy(teacher, teacher.norm.weight.dtype)
    return teacher


def watch_of(run, student, lesson, past):
    """What watches this training, or None: a forgetting is to do damage. past: what watched it in
    an earlier process."""
    c, stages = run.config, run.stages
    if not lesson.held_out:
        return None
    began = time.perf_counter()
    damaged = stages.get("degraded") is not stages.get("healthy")
    if lesson.recovery and c.watch == "cka":
        value = guard.distance_by_cka(run, student)
    else:
        value = guard.held_out_loss(run, student, lesson)
    strict = lesson.recovery and damaged
    before = past["seconds"] if past else 0.0
    watch = guard.Watch(student, value, c.patience, strict, past=past)
    watch.seconds = before + time.perf_counter() - began
    return watch


def trainable_(c, student, base):
    """The student, damaged or not, made ready to be trained, in place."""
    for name, p in student.named_parameters():
        p.requires_grad_(c.train_embeddings or not name.startswith(("embed_", "lm_head")))
    if c.lora:
        generator = torch.Generator().manual_seed(c.seed)
        quant.add_lora_(student, c.lora, c.lora_alpha, generator)
    quant.compute_in_(student, getattr(torch, c.dtype))
    there = dict(base.named_parameters())
    for name, _ in student.named_weights():
        ours, theirs = student.stored(name), there.get(name)
        if ours.requires_grad or theirs is None:
            continue
        if ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs):
            ours.data = theirs.data  # untrained and equal: one memory for both
    student.gradient_checkpointing = c.gradient_checkpointing
    if c.shard:
        parallel.shard_(student)
    return student


def rollout_of(run, generator):
    """rollout(student, prompts): the student's own answers, made in shares on all processes."""
    def rollout(student, prompts):
        mine = parallel.share(range(len(prompts)))
        return parallel.gather(answers(run, student, prompts, generator, mine))
    return rollout


def answers(run, student, prompts, generator, rows):
    """The student's completions of these rows of the prompts, sampled as --temperature says."""
    c = run.config
    return run.generate(
        parallel.whole(student, getattr(torch, c.dtype)), prompts, c.rollout_tokens, c.temperature,
        c.top_p, run.evaluation.tokenizer.eos_ids, generator, batch_size=c.batch_size, rows=rows)


def show_step(run, student, teacher, lesson):
    """The first step's rollouts as the student would make them now, one for each of the first two
    tasks, and what the teacher makes of them: `evaluate.trace`. Only of a recovery by SDFT."""
    if lesson.how != "sdft" or not lesson.recovery:
        return []
    rows = range(min(2, len(run.config.data.split(",")), len(lesson.batches[0])))
    batch, generator = lesson.batches[0], torch.Generator().manual_seed(run.config.seed)
    student = parallel.plain_copy(student, getattr(torch, run.config.dtype))
    completions = answers(run, student, [p.student for p in batch], generator, rows)
    return evaluate.trace(student, teacher, [batch[i] for i in rows], completions,
                          run.evaluation.tokenizer, run.score)


# ------------------------------------------------------------------------------------ the results

@contextlib.contextmanager
def timed(seconds, name):
    """seconds[name] = how long the body took, before the run was broken off, too; so_far() is that,
    in the body."""
    began = time.perf_counter() - seconds.get(name, 0.0)

    def so_far():
        return time.perf_counter() - began
    yield so_far
    seconds[name] = so_far()


@contextlib.contextmanager
def log_of(run, stage):
    """A function that keeps a dictionary in run.lines and writes it as a line of metrics.jsonl;
    the file is process 0's. A line that cannot be written ends nothing."""
    path = Path(run.config.out) / "metrics.jsonl" if parallel.rank() == 0 else os.devnull
    with open(path, "ab", buffering=0) as file:
        def log(line):
            line = {"stage": stage, **line}
            run.lines.append(line)
            text = (evaluate.to_json(line) + "\n").encode()
            with contextlib.suppress(OSError):  # a full disk: what it still holds is known later
                written = file.write(text)
                if written < len(text):
                    file.truncate(file.tell() - written)
        yield log


def results_of(run):
    """results.json's content."""
    stages, fractions, changes = run.stages, {}, {}
    for lesson in run.recoveries:
        if lesson.how != "none":
            changes[lesson.stage] = {
                metric: evaluate.change(stages["degraded"], stages[lesson.stage], metric)
                for metric in stages["healthy"].items}
        three = stages["healthy"], stages["degraded"], stages[lesson.stage]
        fractions[lesson.stage] = {metric: evaluate.recovered_fraction(*three, metric)
                                   for metric in stages["healthy"].items}
    levels = dict.fromkeys(level for m in stages.values() for level in m.cka)
    return {
        "config": dataclasses.asdict(run.config), "environment": environment(run),
        "stages": {name: {metric: m.value(metric) for metric in m.items}
                   for name, m in stages.items()},
        "recovered_fraction": fractions.get("recovered", fractions),
        "change": changes, "guard": run.guard, "teacher": run.asked,
        "cka": {level: {name: m.cka[level] for name, m in stages.items() if m.cka}
                for level in levels},
        "cka_layers": {name: m.layers for name, m in stages.items() if m.layers},
        "items": {name: {metric: evaluate.as_text(values) for metric, values in m.items.items()}
                  for name, m in stages.items()},
        "kl": {metric: {name: m.kl[metric] for name, m in stages.items() if metric in m.kl}
               for metric in run.evaluation.windows},
        "along": {name: [*points, end_of(run, name)] for name, points in run.along.items()},
        "step": run.shown, "seconds": run.seconds}


def end_of(run, stage):
    """The last of a recovery's points: the student that it left."""
    seconds = seconds_of_steps(run, stage)
    kept = run.guard.get(stage, {}).get("kept", len(seconds))
    where = {"step": kept, "part": None, "seconds": sum(seconds)}
    return where | evaluate.point(run.stages[stage])


def seconds_of_steps(run, stage):
    """What each step of this training took so far, a list."""
    return [line["seconds"] for line in run.lines if line["stage"] == stage]


def environment(run):
    """Everything a number depends on and a reader cannot see."""
    device = run.config.device
    found = {**run.facts, "python": platform.python_version(), **resume.machine(run.config),
             "machine": platform.machine(), "processes": parallel.size(),
             "command": " ".join(map(shlex.quote, sys.argv)), "revision": revision(),
             "date": datetime.datetime.now().isoformat(timespec="minutes"),
             "peak_memory_gib": parallel.peak_memory_gib()}
    if run.machine not in (None, resume.machine(run.config)):
        found["begun_on"] = run.machine
    if device != "cpu":
        found["peak_gpu_memory_gib"] = parallel.peak_memory_gib(device)
    return found


def revision():
    """The commit of this code, and whether the code was changed since; "" if git cannot say."""
    if not shutil.which("git"):
        return ""
    git = ["git", "-C", str(Path(__file__).parent)]
    said = [subprocess.run([*git, *asked], capture_output=True, text=True)
            for asked in (["rev-parse", "HEAD"], ["status", "--porcelain", "*.py"])]
    if any(done.returncode for done in said):
        return ""
    return said[0].stdout.strip() + (" and changes" if said[1].stdout.strip() else "")


def finish(run, results, students):
    """Write and show what came of a run, the small things first.

    What cannot be written, on a full disk say, takes nothing else with it: OSError names it, when
    all the rest is there.
    """
    out, absent, failed = Path(run.config.out), [], []
    folders = {f"{resume.student_of(out, stage).name}/": s for stage, s in students.items()}
    parts = {"results.json": lambda: write_results(out, results),
             "metrics.jsonl": lambda: resume.write_lines(run, out),  # all, if the disk was full
             "the report": lambda: show(run, results),
             "report.png": lambda: evaluate.draw(results, run.lines, out / "report.png")}
    for name, student in folders.items():
        parts[name] = partial(save_student, run.folder, student, out / name)
    for name, write in parts.items():
        try:
            if write() is False:
                absent.append(name)
        except OSError as error:
            absent.append(name)
            failed.append(f"{name} ({error.strerror or error})")
    left = [name for name in ("results.json", "metrics.jsonl", *folders, "report.png")
            if name not in absent]
    if failed:
        known = (run.checkpoint / resume.LATEST).exists()
        later = f"; {resume.how_to_go_on(run.config)}" if known else ""
        raise OSError(f"{', '.join(failed)} could not be written; in {out} is {', '.join(left)}"
                      f"{later}")
    print(f"wrote {out}/{', '.join(left)}")


def write_results(out, results):
    """DIR/results.json."""
    with whole(out / "results.json") as part:
        part.write_text(evaluate.to_json(results, indent=1) + "\n", encoding="utf-8")


def show(run, results):
    """Print the report."""
    print(evaluate.text(results, {name: m.answers for name, m in run.stages.items()}), flush=True)


def save_student(source, student, folder):
    """DIR/student: a folder that this project and transformers load, with the tokenizer of source;
    its weights come last, so that where they are is all else. Those of an earlier run go first: if
    there is no room for these, they are not taken for them."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").unlink(missing_ok=True)
    checkpoint.copy_tokenizer(source, folder)
    student.save_pretrained(folder)


def main(argv=None):
    """The command line; returns the exit code, 2 for a user's mistake."""
    evaluate.any_terminal()
    config = parse(argv)
    config.device = parallel.start(config.device)
    try:
        with parallel.watching_peers(), resume.Interrupt().caught() as interrupt:
            code = whole_run(config, interrupt)
    except resume.Finished as finished:
        if parallel.rank() == 0:
            print(finished)
        code = finished.code
    except OSError as error:
        return complain(error, 2)
    except sdft.Diverged as error:
        return complain(f"{error}, and nothing watched this training: no results were written; "
                        "try a smaller --lr, of forgetting --forget-lr", 1)
    except (parallel.PeerLost, KeyboardInterrupt) as stopped:
        what = "interrupted" if isinstance(stopped, KeyboardInterrupt) else \
            "another process of this run has died"
        return complain(f"{what}; {resume.how_to_go_on(config)}", 1)
    first = parallel.rank() == 0
    parallel.stop()
    return code if first else 0  # torchrun ends the others when one has failed


def whole_run(config, interrupt):
    """Prepare, execute, finish; the exit code."""
    try:
        check_bounds(config)
        if config.verify or config.dry_run:
            import proof
            return proof.verify(config) if config.verify else proof.dry_run(config)
        run = prepare(config)
        resume.begin(run)
    except ValueError as error:
        return complain(error, 2)
    run.interrupt, done = interrupt, False
    try:
        results, students = execute(run)
        interrupt.held = "what came of this run is written"
        if parallel.rank() == 0:
            finish(run, results, students)
        done = True
    except sdft.Diverged:
        done = True  # to go on would be to diverge again
        raise
    finally:
        resume.end(run, done)
    return int(any(found["ended"] for found in run.guard.values()))


def complain(error, code):
    """One line, from one process; returns the exit code."""
    if parallel.first_to_speak():
        if code == 1:  # a progress bar was left standing
            print(file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
