"""Damage a language model, watch it get worse, let its healthy checkpoint teach it back.

    python train.py --degrade int4                  # SmolLM2-135M-Instruct, fetched once
    python train.py --degrade ffn10,nf4 --model DIR

`run` is the story: healthy → degraded → recovered, each measured. `teach` is one training. Each
dictionary (WAYS, DAMAGES, and those of the other files) names what an option may say, so a fork
adds an entry. PARTS holds the functions of the loop, which `--with EXTRA` replaces.

Where this departs from the paper, or fills in what it leaves open, is listed in README.
"""
import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

import cka
import data
import model
import prune
import quant
import sdft
from data import DEMOS
from model import GPT, frozen_copy

sys.modules["train"] = sys.modules[__name__]  # `import train` is this file, the program as well

# ------------------------------------------------------------------------------ the configuration

def option(default, help, **extra):
    """A Config field: its default, its line in --help; group, bounds (least, most), choices."""
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@dataclass
class Config:
    """The whole configuration of a run; every field is a command-line option of the same name."""

    model: str = option("", "folder, .gguf file or hub name of the healthy model (default: "
                        "SmolLM2-135M-Instruct, fetched once)", group="run")
    data: str = option("science,text", "tasks to recover on: science, tooluse, text, files")
    seed: int = option(0, "seed of the data's order and of the rollouts", least=0, most=2 ** 63 - 1)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    dtype: str = option("auto", "type of computation (auto: bfloat16 where it is fast)",
                        choices=["auto", "float32", "bfloat16"])
    out: str = option("out", "folder for results.json, metrics.jsonl, student/ and report.png")

    degrade: str = option("", "ffn10 (percent of the neurons removed), magnitude30, wanda30 "
                          "(percent of the weights held at zero), magnitude2:4, wanda2:4, int2 … "
                          "int8, nf4; none [int4; none with --student, --forget, --bootstrap]",
                          group="damage (§5.2)")
    student: str = option("", "damaged model of one's own, to be recovered")
    group_size: int = option(64, "inputs that share an integer scale; 0: a whole row", least=0)
    symmetric: bool = option(True, "symmetric integers around 0, or an integer zero point")
    importance: str = option("activation", "worth of a neuron that ffn may remove",
                             choices=["activation", "weight"])
    calibration: int = option(64, "training examples that activations are taken from", least=1)

    forget: str = option("", "tasks to forget by: SDFT on --data makes an expert, the healthy "
                         "model, which is then fine-tuned on these (§5.1)", group="history")
    forget_steps: int = option(20, "steps of that fine-tuning", least=1)
    forget_lr: float = option(0.0, "its learning rate, as --lr; 0: 1.56e-3 of the weights' RMS",
                              least=0)
    bootstrap: str = option("", "larger model that teaches the healthy one first (§5.3)")
    expert_steps: int = option(25, "steps of --bootstrap, or to --forget's expert", least=1)

    recover: str = option("sdft", "ways of recovery: sdft; kd (the teacher scores the expert's "
                          "answers); sft (the expert's answers alone); none", group="recovery (§3)")
    teacher: str = option("healthy", "healthy (just before the damage; with --forget the expert), "
                          "base (--model), folders")
    demo: str = option("turn", "the teacher's view of the expert demonstration: an earlier turn, a "
                       "quote, none", choices=DEMOS)
    teacher_check: int = option(48, "training prompts a task that a teacher is asked", least=0)
    loss: str = option("forward_kl", "divergence between teacher and student", choices=sdft.LOSSES)
    rollout_tokens: int = option(32, "longest rollout, in tokens", least=1)
    text_prompt_tokens: int = option(48, "tokens of a text prompt, at most half the text", least=1)
    temperature: float = option(0.6, "temperature of the rollouts", least=0)
    top_p: float = option(1.0, "nucleus of the rollouts", least=1e-9, most=1)

    steps: int = option(25, "optimizer steps", least=1, group="optimizer (AdamW)")
    batch_size: int = option(16, "prompts a step, shared evenly by the tasks", least=1)
    lr: float = option(0.0, "peak learning rate, a matrix's in proportion to its size; 0: by "
                       "--lr-fraction", least=0)
    lr_fraction: float = option(5.2e-4, "the same, in root mean squares of the blocks' weights "
                                "(--lora: ten times that)", least=1e-12)
    warmup: int = option(2, "steps of linear warm-up; the last half decays to 0", least=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", least=0)
    clip: float = option(1.0, "largest norm of the gradient", least=1e-12)
    micro_batch: int = option(16, "prompts that go through the models together", least=1)
    train_embeddings: bool = option(False, "train embeddings and head, too")
    lora: int = option(0, "rank of low-rank updates; 0: all weights train", least=0)

    eval: str = option("", "further tasks or .jsonl files to measure only", group="measuring")
    text: str = option("python", "texts to measure perplexity on: python (held-out documentation), "
                       "files")
    eval_tokens: int = option(0, "longest answer; 0: that of the longest demonstration", least=0)
    eval_limit: int = option(0, "examples of each evaluation split; 0: all", least=0)
    cka_samples: int = option(64, "evaluation sequences that CKA is taken over", least=4)


MODELS = "--model", "--student", "--teacher", "--bootstrap"
BROUGHT = [  # options, a pattern of their values, and the extra that such a value brings
    (("--degrade",), r"nvfp4|mxfp4|nf4dq", "grids"),
    (("--recover",), r"ema|skip|cka|stop|anchor|own", "variants"),
    (MODELS, r".+\.gguf|[\w.-]+/[\w.-]+(@[\w./-]+)?", "formats")]


def parse(argv):
    """(the command line as a Config, with the extras' own options; the extras)."""
    words = [part for word in argv for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    names, folder = [], Path(__file__).parent / "extras"
    for name, values in zip(words, (word.split(",") for word in words[1:])):
        names += values if name == "--with" else []
        names += [extra for options, pattern, extra in BROUGHT for value in values
                  if name in options and re.fullmatch(pattern, value) and not Path(value).is_dir()]
    if importlib.util.find_spec("matplotlib") and (folder / "picture.py").exists():
        names.insert(0, "picture")
    for name in names:
        require((folder / f"{name}.py").exists(), f"extras/{name}.py is needed and is not there")
    extras = [importlib.import_module(f"extras.{name}") for name in dict.fromkeys(names)]
    further = [(name, type(default), option(default, help)) for extra in extras
               for name, (default, help) in getattr(extra, "OPTIONS", {}).items()]
    cls = dataclasses.make_dataclass("Config", further, bases=(Config,))
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, group = partial(require, False), parser
    parser.add_argument("--with", metavar="EXTRA,…", help="files of extras/ to add (several things "
                        "stand by commas, here and below)")
    for f in dataclasses.fields(cls):
        words = dict(f.metadata)
        group = parser.add_argument_group(words.pop("group")) if "group" in words else group
        kind = partial(number, f.type, words.pop("least", -math.inf), words.pop("most", math.inf))
        words |= ({"action": argparse.BooleanOptionalAction} if f.type is bool else
                  {"type": f.type if f.type is str else kind})
        words["help"] = f"{words['help']} [{f.default}]".removesuffix(" []").replace("%", "%%")
        group.add_argument("--" + f.name.replace("_", "-"), default=f.default, **words)
    asked = vars(parser.parse_args(argv))
    asked.pop("with")
    return cls(**asked), extras


def number(kind, least, most, text):
    """A number of an option within its bounds; argparse makes one line of the error."""
    with contextlib.suppress(ValueError):
        if least <= kind(text) <= most and math.isfinite(kind(text)):
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {least} to {most}")


def require(condition, message):
    """ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)


# -------------------------------------------------------------------------------------- the story

def run(c):
    """Healthy → degraded → recovered, each measured: (results, memories of trainings, students)."""
    setup, dtype, copy, stage = prepare(c), getattr(torch, c.dtype), PARTS["copy"], PARTS["stage"]
    student, teachers, lessons = setup.student, setup.teachers, setup.lessons
    stages, trained, asked, students = {}, {}, {}, {}
    PARTS["begin"](c, setup.facts)

    # healthy: the model as it is, or an expert made of it (§5.1, §5.3)
    if c.bootstrap or c.forget:
        way, teacher, loss = "sdft", "base", c.loss
        if c.bootstrap:
            way, teacher, loss = "kd", c.bootstrap, "reverse_kl"  # Fig. 7 writes KL(3B || 7B)
        stages["base"] = stage("base", partial(measure, setup, teachers["base"], name="base"))
        student, trained["healthy"] = stage("healthy training", partial(
            teach, c, setup, "healthy", student, teachers[teacher], way, lessons["expert"], loss))
        teachers["healthy"] = copy(student, dtype)
    healthy = teachers.setdefault("healthy", teachers["base"])
    stages["healthy"] = stage("healthy", partial(measure, setup, healthy, name="healthy"))
    states = states_of(setup, healthy)

    # degraded: fine-tuned on something else (§5.1), pruned, quantized (§5.2)
    if c.forget:
        student, trained["degraded"] = stage("degraded training", partial(
            teach, c, setup, "degraded", student, None, "sft", lessons["forgetting"], c.loss))
    undamaged = copy(student, student.norm.weight.dtype) if len(recoveries(c)) > 1 else None
    setup.facts["damage"] = degrade_(c, student, setup.calibration)
    stages["degraded"] = stages["healthy"]
    if c.forget or c.student or c.degrade != "none":
        stages["degraded"] = stage("degraded", partial(
            measure, setup, copy(student, dtype), states, name="degraded"))

    # recovered: the healthy checkpoint teaches the damaged student (§3); each time the same damage
    for n, (name, way, teacher) in enumerate(recoveries(c)):
        if n:
            student = copy(undamaged, undamaged.norm.weight.dtype)
            degrade_(c, student, setup.calibration)
        if teacher and setup.samples and teacher not in asked:
            asked[teacher] = stage(f"asking {teacher}", partial(
                check_teacher, setup, teachers[teacher], c.demo))
        stages[name] = stages["degraded"]
        if way != "none":
            student, trained[name] = stage(f"{name} training", partial(
                teach, c, setup, name, student, teachers.get(teacher), way, lessons["recovery"],
                c.loss))
            stages[name] = stage(name, partial(
                measure, setup, copy(student, dtype), states, name=name))
        students[name] = student.cpu()
    return results_of(c, setup.facts, stages, trained, asked), trained, students


def recoveries(c):
    """[(stage, way, teacher)] for each --recover and --teacher; sft and none have no teacher."""
    found = []
    for way in c.recover.split(","):
        alone = way in ("sft", "none")
        for i, teacher in enumerate([""] if alone else c.teacher.split(",")):
            words = ["recovered"] + ([way] if "," in c.recover else [])
            if "," in c.teacher and not alone:
                words.append(teacher if teacher in ("base", "healthy") else f"teacher{i + 1}")
            found.append(("_".join(words), way, teacher))
    return found


@dataclass
class Setup:
    """What `prepare` reads for a run: what is asked of every model, and what a training takes."""

    tokenizer: data.Tokenizer
    splits: dict       # metric -> [Example]
    windows: dict      # metric -> [ids], all of one length: text, for perplexity
    sequences: dict    # task -> [ids]: prompts with their answers, for CKA
    eval_tokens: int   # longest answer; 0: that of its split's longest demonstration
    student: GPT       # to be damaged, or damaged already (--student)
    teachers: dict     # name -> GPT, frozen: base and folders; healthy comes in time
    lessons: dict      # expert, forgetting, recovery -> (batches, {task: held-out prompts})
    samples: dict      # task -> training examples that a teacher is asked before it teaches
    calibration: list  # ids that activations are taken from
    facts: dict        # hashes, counts and learning rates, for results.json


HELD_OUT = 16         # prompts of each task that are never trained on: KeepBest's
FORGET = 1.56e-3      # learning rate of forgetting, as a fraction of the weights' RMS
LORA, ALPHA = 10, 32  # how much larger the learning rate of low-rank updates is; their alpha


def prepare(c):
    """A Setup: everything is read and checked before the run writes anything."""
    c.degrade = c.degrade or ("none" if c.student or c.forget or c.bootstrap else "int4")
    ways, who, given = c.recover.split(","), c.teacher.split(","), c.data.split(",")
    for many, known in ((ways, [*WAYS]), (who, who)):
        require({*many} <= {*known} and len({*many, ""}) == len(many) + 1,
                f"--recover, --teacher: {many} must be among {known}, and none twice")
    require(not (c.student and (c.bootstrap or c.forget)), "--student is a damaged model, and "
            "--bootstrap and --forget make a healthy one: leave out one")
    require(not (c.lora and c.train_embeddings), "--lora goes without --train-embeddings")
    others = sorted({*who, c.bootstrap, c.student} - {"healthy", "base", ""})
    cuda, seen = re.fullmatch(r"cuda(?::(\d+))?", c.device), torch.cuda.device_count()
    require(c.device == "cpu" or cuda and int(cuda[1] or 0) < seen,
            f"--device {c.device}: this torch sees {seen} CUDA devices; try --device cpu")
    if c.dtype == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast = torch.cuda.get_device_capability(c.device) >= (8, 0) if cuda else fast
        c.dtype = "bfloat16" if fast else "float32"
    dtype = getattr(torch, c.dtype)

    # what is trained on, what is held out of that, what is measured
    lost = c.forget.split(",") if c.forget else []
    loaded = {name: data.load_task(name) for name in [*given, *lost]}
    further = [data.load_task(name, measured_only=True) for name in c.eval.split(",")
               if name and name not in loaded]
    measured = [task for task in [*loaded.values(), *further] if task.eval]
    texts = {"" if name == "python" else Path(name).stem:
             data.split_text()[1] if name == "python" else data.read_text(name)
             for name in c.text.split(",")}
    texts = {f"perplexity_{name}" if i else "perplexity": text
             for i, (name, text) in enumerate(texts.items())}
    require(len({task.name for task in measured}) + len(texts)
            == len(measured) + c.text.count(",") + 1, "two files that are measured have one name")
    left_out = data.drop_measured_([*loaded.values()], further)
    tasks, watched = zip(*(data.hold_out(loaded[name], HELD_OUT) for name in given))
    held_out = {task.name: examples for task, examples in zip(tasks, watched)}
    splits = {f"{task.name}_{split}": spread(examples, c.eval_limit)
              for task in measured for split, examples in task.eval.items()}

    # the student, who may teach it, and that all know the same tokens
    folders = {name: model.resolve(name) for name in (c.model, *others)}
    tokenizer = PARTS["tokenizer"](folders[c.model])
    student = GPT.from_pretrained(folders[c.model], dtype if c.lora else torch.float32, c.device)
    teachers = {"base": frozen_copy(student, dtype)}
    for name in others:
        require(PARTS["tokenizer"](folders[name]).bytes_of == tokenizer.bytes_of,
                f"{name}: its tokenizer must be that of the healthy model, {folders[c.model]}")
        gpt = GPT.from_pretrained(folders[name], torch.float32 if name == c.student else dtype,
                                  c.device)
        if name == c.student:
            student = gpt
        else:
            teachers[name] = gpt.requires_grad_(False)
    require(student.config.n_layer == teachers["base"].config.n_layer,
            f"{c.student} has {student.config.n_layer} layers, the healthy model another number")
    for name, gpt in teachers.items():
        require(tokenizer.size <= min(gpt.config.vocab_size, student.config.vocab_size),
                f"{name} or the student knows fewer ids than the tokenizer has, {tokenizer.size}")
    multiple_of_groups(c, student.config)
    context = min(gpt.config.context_length for gpt in [student, *teachers.values()])

    # prompts, as student and teacher see them
    def fits(e, tokens):
        require(tokens <= context, f"{e.where or repr(e.prompt[:40])}: a prompt with its answer "
                                   f"takes {tokens} tokens, more than the context of {context}")

    def lesson(tasks, held_out, steps, order, student="none", teacher="none"):
        """(batches of sdft.Prompt, {task: held-out prompts}) in these forms of demonstration."""
        def prompt(e):
            views = [data.teacher_prompt(tokenizer, e, demo, c.text_prompt_tokens)
                     for demo in (student, teacher)]
            answer = data.expert_answer(tokenizer, e, c.text_prompt_tokens, c.rollout_tokens)
            fits(e, max(map(len, views)) + max(len(answer), c.rollout_tokens))
            return sdft.Prompt(*views, answer)
        batches = data.batches(tasks, steps, c.batch_size, order)
        return ([[prompt(e) for e in batch] for batch in batches],
                {name: [prompt(e) for e in examples] for name, examples in held_out.items()})

    taught, demo = any(teacher for *_, teacher in recoveries(c)), c.demo
    lessons = {"recovery": lesson(tasks, held_out, c.steps, c.seed,
                                  teacher=demo if taught else "none")}
    if c.bootstrap or c.forget:  # in a bootstrap both see the demonstration
        demo = "turn" if demo == "none" else demo
        lessons["expert"] = lesson(tasks, held_out, c.expert_steps, f"expert {c.seed}",
                                   demo if c.bootstrap else "none", demo)
    if c.forget:
        lessons["forgetting"] = lesson([loaded[name] for name in lost], {}, c.forget_steps,
                                       f"forget {c.seed}")
    samples = {task.name: spread([e for e in task.train if e.chat and e.check], c.teacher_check)
               for task in tasks if c.teacher_check}
    calibration = []
    if any(what is not put_on_grid for what, _ in damages(c)):
        for e in data.batches(tasks, 1, c.calibration, c.seed)[0]:
            ids = data.begun(tokenizer, tokenizer.encode(e.prompt))[:min(128, context)]
            calibration.append(sequence(tokenizer, e) if e.chat else ids)

    # what is measured
    windows, sequences, prefix = {}, {}, [*tokenizer.prefix]
    for metric, text in texts.items():
        parts = data.text_windows(tokenizer, text, length=min(256, context - len(prefix)))
        windows[metric] = [[*prefix, *ids] for ids in parts]
    for task in [*tasks, *(loaded[name] for name in lost)]:
        examples = [e for e in spread(next(iter(task.eval.values()), []), c.eval_limit)
                    if e.chat and e.response]
        examples = examples[:: max(1, len(examples) // c.cka_samples)][:c.cka_samples]
        if len(examples) >= 4:  # the debiased estimator needs as many
            sequences[task.name] = [sequence(tokenizer, e) for e in examples]
    data.check_special_tokens(tokenizer, [
        e for part in (*(task.train for task in loaded.values()), *splits.values()) for e in part])
    for examples in splits.values():
        longest = answer_tokens(tokenizer, examples, c.eval_tokens)
        for e in examples:
            fits(e, len(data.student_prompt(tokenizer, e)) + longest)

    weights = [linear.weight.detach() for linear in quant.block_linears(student)]
    rms = math.sqrt(sum(w.float().square().sum().item() for w in weights)
                    / sum(w.numel() for w in weights))
    usual = rms * (LORA if c.lora else 1)
    seen = [repr([[(e.prompt, e.response, *e.earlier) for e in examples] for examples in part])
            for part in ([task.train for task in tasks], splits.values())]
    data_sha, eval_sha, text_sha = (hashlib.sha256(text.encode()).hexdigest()[:12]
                                    for text in (*seen, texts["perplexity"]))
    facts = {
        "model": str(folders[c.model]), "model_sha256": model.weights_sha256(folders[c.model])[:12],
        "parameters": sum(p.numel() for p in student.parameters()), "damage": {},
        "data_sha256": data_sha, "eval_sha256": eval_sha, "text_sha256": text_sha,
        "eval_examples": {metric: len(examples) for metric, examples in splits.items()},
        "text_tokens": sum(map(len, windows["perplexity"])),
        "text_window": len(windows["perplexity"][0]),
        "context_length": student.config.context_length, "left_out": left_out,
        "lr": c.lr or c.lr_fraction * usual, "forget_lr": c.forget_lr or FORGET * usual,
        "weights_rms": rms}
    return Setup(tokenizer, splits, windows, sequences or {"text": windows["perplexity"]},
                 c.eval_tokens, student, teachers, lessons,
                 {task: examples for task, examples in samples.items() if examples}, calibration,
                 facts)


def sequence(tokenizer, e):
    """An example's bare prompt with its demonstration, as ids (§4.2: prompt + ground truth)."""
    return data.student_prompt(tokenizer, e) + tokenizer.answer(e.response)


def spread(items, limit):
    """At most `limit` of the items (0: all), evenly spread over them.

    >>> spread(list("abcdefg"), 3)
    ['a', 'c', 'e']
    """
    n = min(limit, len(items)) if limit else len(items)
    return [items[i * len(items) // n] for i in range(n)]


# ------------------------------------------------------------------------------------ one training

# The ways of recovery: functions of (student, teacher, batches, rollout, *, loss, backward, …).
WAYS = {
    "sdft": sdft.recover,
    "kd": lambda student, teacher, batches, rollout, **how: sdft.recover(
        student, teacher, batches, None, **how),
    "sft": lambda student, teacher, batches, rollout, *, loss, backward, **how: sdft.sft(
        student, batches, **how),
    "none": None}
FROM_ANSWERS = {"sft"}  # ways that KeepBest watches by cross-entropy, not by the teacher's KL


def teach(c, setup, name, student, teacher, way, lesson, loss):
    """(the student, trained, as a plain float32 model: the best of its weights; what was noted)."""
    (batches, held_out), tokenizer, began = lesson, setup.tokenizer, time.perf_counter()
    dtype, generator = getattr(torch, c.dtype), torch.Generator().manual_seed(c.seed)
    for parameter, p in student.named_parameters():
        p.requires_grad_(c.train_embeddings or not parameter.startswith(("embed_", "lm_head")))
    if c.lora:
        quant.add_lora_(student, c.lora, ALPHA, torch.Generator().manual_seed(c.seed))
    student = PARTS["ready"](quant.compute_in_(student, dtype))
    memory, best, loss = {"step": 0, "lines": []}, None, sdft.LOSSES[loss]
    if held_out:
        watched = None if way in FROM_ANSWERS else teacher
        best = KeepBest(student, held_out_loss(c, student, watched, held_out, loss))
    stop = PARTS["training"](name, student, memory, generator, best)

    def rollout(student, prompts, rows=None, generator=generator):
        """The student's own answers to the prompts, or to some rows of them."""
        mine = PARTS["share"](range(len(prompts))) if rows is None else rows
        said = PARTS["generate"](student, prompts, c.rollout_tokens, c.temperature, c.top_p,
                                 tokenizer.eos_ids, generator, c.batch_size, mine)
        return PARTS["gather"](said) if rows is None else said

    def first_step():
        """The first step's first rollouts as the student would make them now, token by token."""
        plain, batch = PARTS["copy"](student, dtype), batches[0]
        rows = range(min(2, c.data.count(",") + 1, len(batch)))
        said = rollout(plain, [p.student for p in batch], rows,
                       torch.Generator().manual_seed(c.seed))
        return trace(plain, teacher, batch, said, tokenizer)

    def log(line):
        memory["lines"].append({"stage": name, **line})
        PARTS["log"](c, memory["lines"][-1])

    shown = way == "sdft" and name.startswith("recovered")
    if shown and "shown" not in memory:
        memory["shown"] = {"first": first_step()}
    try:
        WAYS[way](student, teacher, batches, rollout, loss=loss, log=log, stop=stop, memory=memory,
                  lr=setup.facts["lr" if held_out else "forget_lr"], warmup=c.warmup,
                  weights_rms=0 if c.lora else setup.facts["weights_rms"], clip=c.clip,
                  weight_decay=c.weight_decay, micro_batch=c.micro_batch, progress=name,
                  **{part: PARTS[part] for part in (
                      "score", "backward", "share", "reduce", "cached", "optimizer")})
    except sdft.Diverged as error:
        if not best:
            raise
        best.ended = str(error)
    if best:
        best.restore()
        memory["guard"] = {part: getattr(best, part) for part in (
            "steps", "checks", "kept", "ended")}
        if best.ended:
            print(f"\nerror: {name}: {best.ended}: went back to step {best.kept}; try a tenth of "
                  f"the learning rate, --lr {setup.facts['lr'] / 10:.2g}", file=sys.stderr)
    if shown:
        memory["shown"]["last"] = first_step()
    memory["seconds"] = memory.get("seconds", 0) + time.perf_counter() - began
    return PARTS["copy"](student, torch.float32), memory


class KeepBest:
    """Keeps the weights with the lowest loss so far; says after each step whether to stop.

    value() gives {"all": loss, task: loss, …} on prompts that are never trained on. It is asked
    before the first step, every `every` steps, and at the end. The training stops where the loss is
    not finite, or above twice its start plus FAR; `ended` then says why.
    """

    FAR = 0.5  # nats a token

    def __init__(self, student, value, every=7):
        self.student, self.value, self.every = student, value, every
        self.steps, self.checks, self.kept, self.ended, self.weights = 0, [], 0, "", []
        self.check()

    def __call__(self):
        self.steps += 1
        return self.steps % self.every == 0 and self.check()

    def trained(self):
        """The parameters that the training changes."""
        return [p.detach() for p in self.student.parameters() if p.requires_grad]

    @torch.no_grad()
    def check(self):
        """Measure, keep the weights if they are the best, and say whether it is time to stop."""
        best = min((check["all"] for check in self.checks), default=math.inf)
        self.checks.append({"step": self.steps, **self.value()})
        start, now = self.checks[0]["all"], self.checks[-1]["all"]
        if self.steps == 0 or now < best:
            self.kept, self.weights = self.steps, [p.to("cpu", copy=True) for p in self.trained()]
        if not now <= 2 * start + self.FAR:
            self.ended = (f"step {self.steps}: the loss on held-out prompts went from {start:.3g} "
                          f"to {now:.3g}")
        return bool(self.ended)

    @torch.no_grad()
    def restore(self):
        """Put the best weights back, in place."""
        if self.steps > self.checks[-1]["step"] and not self.ended:
            self.check()
        for p, best in zip(self.trained(), self.weights):
            p.copy_(best)


def held_out_loss(c, student, teacher, held_out, loss):
    """value() for KeepBest: nats a token on all tokens of the experts' answers.

    The loss is the divergence from the teacher as it is now; without one, cross-entropy.
    """
    parts = []  # (task, the student's prompts, the answers, the teacher's states)
    for task, prompts in held_out.items():
        for i in range(0, len(prompts), c.micro_batch):
            part = PARTS["share"](prompts[i:i + c.micro_batch])
            ys, views = [p.answer for p in part], [p.teacher for p in part]
            with torch.no_grad():
                t = PARTS["score"](teacher, views, ys)[-1] if teacher else None
            parts.append((task, [p.student for p in part], ys, t))

    def value():
        """{"all": the mean over all tokens, and each task's}."""
        losses = []  # (task, sum over some tokens, how many)
        with parametrize.cached():
            for task, views, ys, t in parts:
                s = PARTS["score"](student, views, ys)[-1]
                ids = torch.tensor([i for y in ys for i in y], device=s.device)
                for rows in torch.arange(len(s)).split(64) if ys else ():  # not all logits at once
                    logits = student.head(s[rows])
                    nats = loss(*sdft.known_to_both(logits, teacher.head(t[rows])),
                                torch.ones_like(ids[rows])) if teacher else \
                        F.cross_entropy(logits.float(), ids[rows])
                    losses.append((task, nats.item() * len(rows), len(rows)))
        losses, means = PARTS["gather"](losses), {}
        for task in ("all", *held_out):
            mine = [x for x in losses if task in ("all", x[0])]
            means[task] = sum(nats for _, nats, _ in mine) / sum(n for _, _, n in mine)
        return means
    return value


@torch.no_grad()
def check_teacher(setup, teacher, demo):
    """{task: {"shown": percent, "bare": percent, "examples": n, "helps": bool}}, asked greedily.

    A teacher is asked training prompts as it will see them, and bare, as the student does. The
    demonstration helps if it brings more right answers, by two paired standard errors; a teacher
    that is right nine times in ten needs no help.
    """
    found = {}
    for task, examples in setup.samples.items():
        shown, bare = (torch.tensor([float(e.check(text)) for e, text in zip(
            examples, answers(setup, teacher, examples, form))]) for form in (demo, "none"))
        gain, noise = mean_and_noise(shown - bare)
        found[task] = {"shown": 100 * shown.mean().item(), "bare": 100 * bare.mean().item(),
                       "examples": len(examples),
                       "helps": gain > noise or shown.mean().item() >= 0.9 or demo == "none"}
    return found


# -------------------------------------------------------------------------------- damage (§5.2)

def remove_neurons(student, match, c, sequences):
    """ffn10: neurons of each block's FFN, for good."""
    norms = prune.input_norms(student, sequences) if c.importance == "activation" else None
    before, fraction = student.config.d_ff * student.config.n_layer, int(match["percent"] or 10)
    multiple = multiple_of_groups(c, student.config)
    removed = prune.prune_ffn_(student, fraction / 100, norms, multiple)
    return {"neurons": before, "neurons_removed": removed}


def hold_at_zero(student, match, c, sequences):
    """wanda30, magnitude2:4: single weights, while the student trains."""
    norms = prune.input_norms(student, sequences) if match["method"] == "wanda" else None
    n, m = (int(match["n"]), int(match["m"])) if match["m"] else (None, None)
    zeros = prune.prune_(student, match["method"], int(match["percent"] or 30) / 100, n, m, norms)
    return {"weights_held_at_zero": zeros}


def put_on_grid(student, match, c, sequences):
    """int4, nf4: every linear of the blocks, by quant.SCHEMES."""
    n = quant.quantize_(student, match[0], c.group_size or None, c.symmetric)
    return {"weights_quantized": n}


# A pattern of what --degrade may say -> what does it, in place: a function of (student, the match,
# Config, ids to take activations from) that returns what it did, in numbers.
DAMAGES = {r"ffn(?P<percent>\d\d?)?": remove_neurons,
           r"(?P<method>magnitude|wanda)((?P<n>\d+):(?P<m>\d+)|(?P<percent>\d\d?))?": hold_at_zero}


def damages(c):
    """[(function, match)] of --degrade in the order in which they are done: masks, then grids last,
    since linear.weight is computed anew at each use from then on."""
    found, last = {}, {hold_at_zero: 1, put_on_grid: 2}
    for word in c.degrade.split(",") if c.degrade != "none" else ():
        patterns = {**DAMAGES, "|".join(map(re.escape, quant.SCHEMES)): put_on_grid}
        matches = [(what, re.fullmatch(pattern, word)) for pattern, what in patterns.items()]
        what, match = next((pair for pair in matches if pair[1]), (None, None))
        require(match, f"--degrade: unknown damage {word!r}: choose of ffn10, magnitude30, "
                       f"wanda30, wanda2:4, {', '.join(quant.SCHEMES)}, or none")
        require(what not in found, f"--degrade: {word} cannot be done twice, nor after its like")
        found[what] = match
    return sorted(found.items(), key=lambda pair: last.get(pair[0], 0))


def multiple_of_groups(c, config):
    """The number that the neurons kept in a block must be a multiple of.

    ValueError if the groups of n:m or of a grid do not fit the linears of a GPTConfig.
    """
    sizes, chosen = [1], dict(damages(c))
    if hold_at_zero in chosen:
        sizes.append(int(chosen[hold_at_zero]["m"] or 1))
    if put_on_grid in chosen:
        scheme = chosen[put_on_grid][0]
        sizes.append(quant.BLOCK.get(scheme, c.group_size if scheme[:3] == "int" else 0) or 1)
    multiple = math.lcm(*sizes)
    d_ff = multiple if remove_neurons in chosen and multiple <= config.d_ff else config.d_ff
    for size in sizes:
        for inputs in (config.d_model, config.n_head * config.head_dim, d_ff):
            require(inputs % size == 0, f"--degrade {c.degrade}: groups of {size} (--group-size, "
                    f"n:m) do not divide the {inputs} inputs of a linear layer")
    return multiple


def degrade_(c, student, sequences):
    """Do all that --degrade says, in place; what was done, in numbers."""
    done = {}
    for what, match in damages(c):
        done |= what(student, match, c, sequences)
    return done


# ------------------------------------------------------------------------------- what is measured

@dataclass
class Measurement:
    """One model's performance, item by item, and its likeness to the healthy model."""

    items: dict     # metric -> [n]: 0/1 per example, or nats per token of a text window
    answers: list   # three (prompt, answer) of the first split
    cka: dict       # level -> kind -> [n_layer], against the healthy model (empty for itself)
    layers: list    # CKA of each layer with each of the healthy model's
    seconds: float = 0.0

    def value(self, metric):
        """Perplexity, or accuracy in percent.

        >>> Measurement({"task": torch.tensor([1.0, 0, 0, 1])}, [], {}, []).value("task")
        50.0
        """
        mean = self.items[metric].mean().item()
        if metric.startswith("perplexity"):
            return math.exp(mean) if mean < 700 else math.inf  # a model that training broke
        return 100 * mean


@torch.no_grad()
def measure(setup, gpt, states=None, name=""):
    """A Measurement; its likeness to the model with these `states_of`, if there is one."""
    began, gather, items, shown = time.perf_counter(), PARTS["gather"], {}, []
    n = sum(map(len, [*setup.splits.values(), *setup.windows.values(),
                      *(setup.sequences.values() if states else ())]))
    with tqdm(total=n, desc=f"measure {name}", unit="item", disable=not name) as bar:
        for metric, examples in setup.splits.items():
            if examples[0].choices:
                items[metric] = gather([chosen(setup.tokenizer, gpt, e, bar.update)
                                        for e in PARTS["share"](examples)])
                continue
            texts = answers(setup, gpt, examples, "none", bar.update)
            items[metric] = [float(e.check(text)) for e, text in zip(examples, texts)]
            shown = shown or [(e.prompt, text) for e, text in zip(examples, texts)]
        for metric, windows in setup.windows.items():
            first, nats = max(1, len(setup.tokenizer.prefix)), []  # what is not of the text
            for window in PARTS["share"](windows):
                ids = torch.tensor(window, device=gpt.device)
                logits = gpt.head(gpt.backbone(ids[None, :-1])[0, first - 1:])
                nats.append(F.cross_entropy(logits.float(), ids[first:]).item())
                bar.update()
            items[metric] = gather(nats)
        alike = compare(states_of(setup, gpt, bar.update), states) if states else ({}, [])
    return Measurement({metric: torch.tensor(values) for metric, values in items.items()},
                       shown[:: max(1, len(shown) // 3)][:3], *alike, time.perf_counter() - began)


def answers(setup, gpt, examples, demo, done=None):
    """The model's greedy answers as text, to prompts with this form of demonstration."""
    prompts = [data.teacher_prompt(setup.tokenizer, e, demo) for e in PARTS["share"](examples)]
    completions = PARTS["generate"](
        gpt, prompts, answer_tokens(setup.tokenizer, examples, setup.eval_tokens), 0,
        eos_id=setup.tokenizer.eos_ids, batch_size=128, done=done)
    return PARTS["gather"]([setup.tokenizer.read(ids) for ids in completions])


def answer_tokens(tokenizer, examples, eval_tokens):
    """How many tokens an answer to these examples may take."""
    require(eval_tokens or any(e.response or e.choices for e in examples), f"{examples[0].where}: "
            "no demonstration says how long an answer may be: give --eval-tokens, such as 1024")
    return eval_tokens or max(len(tokenizer.answer(e.response)) for e in examples)


def chosen(tokenizer, gpt, e, done):
    """1.0 if a multiple-choice example's likeliest choice is the right one, else 0.0.

    The log-likelihood is per character of the choice's own text, without the blank before it
    (acc_norm of lm-evaluation-harness); choices without a context, whole sentences, get the sum
    (BLiMP). Where a context is empty, what begins a text predicts the first token.
    """
    separator = tokenizer.added.get("<|endoftext|>", tokenizer.eos_id)
    prompts = [data.begun(tokenizer, tokenizer.encode(x)) or [separator] for x, _ in e.choices]
    targets = [tokenizer.encode(y) for _, y in e.choices]
    logits = gpt.head(PARTS["score"](gpt, prompts, targets)[-1]).float()
    ids = torch.tensor([i for y in targets for i in y], device=logits.device)
    logp = -F.cross_entropy(logits, ids, reduction="none")
    scores = [part.sum().item() for part in logp.split([len(y) for y in targets])]
    if any(x for x, _ in e.choices):
        scores = [s / len(y.removeprefix(" ")) for s, (_, y) in zip(scores, e.choices)]
    done(1)
    return float(scores.index(max(scores)) == e.answer)


@torch.no_grad()
def states_of(setup, gpt, done=None):
    """{task: hidden states of its sequences}: all tokens of the first task, the others' last."""
    first = next(iter(setup.sequences))
    return {task: cka.hidden_states(gpt, PARTS["share"](sequences), last=task != first, done=done)
            for task, sequences in setup.sequences.items()}


def compare(states, healthy):
    """CKA of two models' hidden states: ({level: {kind: [n_layer]}}, [n_layer, n_layer]).

    The levels are the first task's "tokens", those of each sequence (§4.2), and "samples", their
    last tokens (§5.4); then the other tasks' "TASK samples". The square is between all layers.
    """
    likeness, layers, gather = {}, [], PARTS["gather"]
    for task, ours in states.items():
        level = f"{task} samples" if likeness else "samples"
        if not likeness:
            each = gather([cka.token_level([x], [y]) for x, y in zip(ours, healthy[task])
                           if x.size(1) >= 4])  # the debiased estimator needs as many
            likeness["tokens"] = {kind: torch.tensor([one[kind] for one in each],
                                                     dtype=torch.float64).mean(0).tolist()
                                  for kind in cka.KINDS}
        x, y = (gather([h[:, -1:].clone() for h in hidden]) for hidden in (ours, healthy[task]))
        likeness[level], layers = cka.sample_level(x, y), layers or cka.between_layers(x, y)
    return likeness, layers


def mean_and_noise(difference):
    """The mean of paired differences [n], and two of its standard errors: inf for fewer than two.

    >>> mean_and_noise(torch.tensor([1.0, 1, 1]))
    (1.0, 0.0)
    """
    n = len(difference)
    noise = 2 * difference.std().item() / math.sqrt(n) if n > 1 else math.inf
    return difference.mean().item(), noise


def change(before, after, metric):
    """"better", "worse" or "same" between two Measurements, by two paired standard errors."""
    sign = -1 if metric.startswith("perplexity") else 1  # nats: less is better
    mean, noise = mean_and_noise(sign * (after.items[metric] - before.items[metric]))
    if not math.isfinite(mean):
        return "better" if after.items[metric].isfinite().all() else "worse"
    return "better" if mean > noise else "worse" if mean < -noise else "same"


def recovered_fraction(healthy, degraded, recovered, metric):
    """(recovered - degraded) / (healthy - degraded); None unless degraded is worse than healthy.

    >>> three = [Measurement({"task": torch.tensor(right)}, [], {}, [])
    ...          for right in ([1.0, 1, 1, 1, 1], [0.0, 0, 0, 0, 1], [1.0, 1, 0, 0, 1])]
    >>> round(recovered_fraction(*three, "task"), 3)  # 100, 20, 60 %
    0.5
    """
    if change(degraded, healthy, metric) != "better":
        return None
    h, d, r = (m.value(metric) for m in (healthy, degraded, recovered))
    return (r - d) / (h - d)


@torch.no_grad()
def trace(student, teacher, prompts, completions, tokenizer):
    """A step, shown (§3): [{"prompt": its end, "tokens": [a dictionary each]}].

    A token has the probability that student and teacher give it, each after its own prompt; the
    teacher's favourite; and KL(teacher || student) in nats.
    """
    known, shown = min(student.config.vocab_size, teacher.config.vocab_size), []
    for prompt, said in zip(prompts, (completion[:24] for completion in completions)):
        log_s, log_t = (
            F.log_softmax(gpt.head(PARTS["score"](gpt, [view], [said])[-1])[:, :known].float(), -1)
            for gpt, view in ((student, prompt.student), (teacher, prompt.teacher)))
        kl, favourites = (log_t.exp() * (log_t - log_s)).sum(-1).tolist(), log_t.argmax(-1).tolist()
        shown.append({"prompt": tokenizer.decode(prompt.student)[-100:], "tokens": [
            {"token": tokenizer.decode([token], keep_special=True),
             "student": log_s[n, token].exp().item(), "teacher": log_t[n, token].exp().item(),
             "favourite": tokenizer.decode([favourites[n]], keep_special=True), "kl": kl[n]}
            for n, token in enumerate(said)]})
    return shown


# ------------------------------------------------------------------------------------ the results

def results_of(c, facts, stages, trained, asked):
    """results.json's content."""
    names, healthy, degraded = [n for n, *_ in recoveries(c)], stages["healthy"], stages["degraded"]
    fractions = {name: {metric: recovered_fraction(healthy, degraded, stages[name], metric)
                        for metric in healthy.items} for name in names}
    guard, shown, seconds = ({name: memory[part] for name, memory in trained.items()
                              if part in memory} for part in ("guard", "shown", "seconds"))
    compared = {name: m for name, m in stages.items() if m.cka}
    return {
        "config": vars(c), "environment": environment(c, facts),
        "stages": {name: {metric: m.value(metric) for metric in m.items}
                   for name, m in stages.items()},
        "recovered_fraction": fractions if len(names) > 1 else fractions[names[0]],
        "change": {name: {metric: change(degraded, stages[name], metric) for metric in m.items}
                   for name, m in stages.items() if name in names and name in trained},
        "guard": guard, "teacher": asked, "step": shown,
        "cka": {level: {name: m.cka[level] for name, m in compared.items()}
                for level in next((m.cka for m in compared.values()), ())},
        "cka_layers": {name: m.layers for name, m in compared.items()},
        "items": {name: {metric: values.tolist() for metric, values in m.items.items()}
                  for name, m in stages.items()},
        "answers": {name: m.answers for name, m in stages.items()},
        "seconds": {name: m.seconds for name, m in stages.items()}
        | {f"{name} training": spent for name, spent in seconds.items()}}


def environment(c, facts):
    """Everything that a number depends on and a reader cannot see."""
    git, revision, peak = ["git", "-C", str(Path(__file__).parent)], "", 0.0
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        head, changed = (subprocess.run([*git, *words], capture_output=True, text=True, check=True)
                         for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "*.py"]))
        revision = head.stdout.strip() + (" and changes" if changed.stdout.strip() else "")
    with contextlib.suppress(ImportError):  # Windows has no `resource`
        import resource
        unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    processor = f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    if c.device != "cpu":
        processor = torch.cuda.get_device_name(c.device)
        peak = torch.cuda.max_memory_allocated(c.device) / 2 ** 30
    elif Path("/proc/cpuinfo").exists():
        processor += re.search(r"model name\s*(: .*)|$", Path("/proc/cpuinfo").read_text())[1] or ""
    return {**facts, "python": platform.python_version(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "processor": processor.strip(),
            "processes": PARTS["processes"], "command": " ".join(sys.argv), "revision": revision,
            "peak_memory_gib": peak, "date": datetime.datetime.now().isoformat(timespec="minutes")}


def report(results):
    """The run in words: metrics, verdicts, answers, CKA, a step of recovery, and the facts."""
    stages, fractions = results["stages"], results["recovered_fraction"]
    fractions = {"recovered": fractions} if "recovered" in stages else fractions
    width = max(map(len, stages)) + 2
    lines = ["", f"{'':32}{''.join(f'{name:>{width}}' for name in stages)}  recovered fraction"]
    for metric in stages["healthy"]:
        row = "".join(f"{values[metric]:{width}.2f}" for values in stages.values())
        backs = ", ".join("not damaged" if fraction[metric] is None else f"{fraction[metric]:.2f}"
                          for fraction in fractions.values())
        unit = "" if metric.startswith("perplexity") else " %"
        lines.append(f"{metric + unit:32}{row}  {backs:>18}")
    for level, by_stage in results["cka"].items():  # the last layer's
        for kind in ("linear", "linear_debiased", "rbf_debiased"):
            row = "".join(f"{by_stage[name][kind][-1] if name in by_stage else 1:{width}.4f}"
                          for name in stages)
            lines.append(f"{f'CKA {level}, {kind}':32}{row}")
    for name, guard in results["guard"].items():
        losses = {check["step"]: check["all"] for check in guard["checks"]}
        lines += ["", *(f"{name}: {metric} {how}{' than before' * (how != 'same')}"
                        for metric, how in results["change"].get(name, {}).items()),
                  f"{name}: kept step {guard['kept']} of {guard['steps']} (loss on held-out "
                  f"prompts {losses[0]:.3f} → {losses[guard['kept']]:.3f}) {guard['ended']}"]
    lines += [f"the teacher, {teacher}, on {x['examples']} training prompts of {task}: as it "
              f"teaches {x['shown']:.0f} % right; bare {x['bare']:.0f} %"
              + ("" if x["helps"] else "; the demonstration does not help: try another --demo")
              for teacher, tasks in results["teacher"].items() for task, x in tasks.items()]
    for i, (prompt, _) in enumerate(results["answers"]["healthy"]):
        lines += ["", f"> {prompt}", *(f"  {name:{width}}{' '.join(given[i][1].split())}"
                                       for name, given in results["answers"].items())]
    for name, shown in list(results["step"].items())[:1]:
        lines += ["", f"A step, shown ({name}), before and after it: what the student says, how "
                  "likely student and teacher", "find that, what the teacher prefers, and "
                  "KL(teacher || student) in nats"]
        header = f"{'token':12}{'student':>8}{'teacher':>8}  {'prefers':12}{'KL':>6}"
        for first, last in zip(shown["first"], shown["last"]):
            rows = zip_longest(*([header] + [
                f"{t['token']!r:12.12}{t['student']:>8.0%}{t['teacher']:>8.0%}  "
                f"{t['favourite']!r:12.12}{t['kl']:>6.2f}" for t in x["tokens"]]
                for x in (first, last)), fillvalue="")
            lines += ["", f"> {' '.join(first['prompt'].split())}",
                      *(f"  {left:48}  {right}".rstrip() for left, right in rows)]
    facts = {**results["environment"], "seconds": results["seconds"]}
    return "\n".join([*lines, "", *(f"{name}: {value}" for name, value in facts.items())])


def begin(c, facts):
    """Make --out, and take away an earlier run's results, which a broken run would leave there."""
    try:
        Path(c.out).mkdir(parents=True, exist_ok=True)
        Path(c.out, "metrics.jsonl").write_text("")
        Path(c.out, "results.json").unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to --out {c.out}: {error.strerror}; choose another") from None


def log(c, line):
    """A step's numbers as a line of metrics.jsonl, at once; a full disk ends no training."""
    with contextlib.suppress(OSError), open(Path(c.out, "metrics.jsonl"), "a") as file:
        file.write(json.dumps(line) + "\n")


def write(c, results, trained, students):
    """All that a run leaves in --out, the small things first; what fails takes nothing with it."""
    lines = [json.dumps(line) + "\n" for memory in trained.values() for line in memory["lines"]]

    def file(name, text):
        part = Path(c.out, f"{name}.part")  # whole, or not at all
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, Path(c.out, name))
        finally:
            part.unlink(missing_ok=True)

    def folder(name, student):
        student.save_pretrained(Path(c.out, name))
        model.copy_tokenizer(model.resolve(c.model), Path(c.out, name))

    parts = {"results.json": partial(file, "results.json", json.dumps(results, indent=1)),
             "metrics.jsonl": partial(file, "metrics.jsonl", "".join(lines)),
             "the report": lambda: print(report(results), flush=True)}
    parts |= {name: partial(folder, name, student) for name, student in (
        (stage.replace("recovered", "student"), student) for stage, student in students.items())}
    failed = []
    for name, make in parts.items():
        try:
            make()
        except OSError as error:
            failed.append(f"{name} ({error.strerror or error})")
    require(not failed, f"in {c.out}, {', '.join(failed)} could not be written; the rest is there")
    print(f"wrote {', '.join(parts)} in {c.out}")


# The functions of the loop, in whose place extras put their own. share(rows) is this process's part
# and gather(list) everyone's; ready(student) comes before the first step; training(…) gives stop().
PARTS = {
    "score": sdft.score, "backward": sdft.backward, "generate": model.generate,
    "tokenizer": data.load_tokenizer, "optimizer": sdft.AdamW, "copy": frozen_copy,
    "ready": lambda student: student, "cached": True, "share": list, "gather": list,
    "reduce": None, "processes": 1, "begin": begin, "stage": lambda name, make: make(),
    "training": lambda name, student, memory, generator, best: best, "log": log, "write": write}


def main(argv=None):
    """The command line; returns the exit code: 2 for a user's mistake, 1 for a failed training."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a terminal has no character for is a ?
    before = dict(PARTS)
    try:
        c, extras = parse(sys.argv[1:] if argv is None else argv)
        PARTS["config"] = c
        for extra in extras:
            extra.attach(PARTS)
        results, trained, students = run(c)
        PARTS["write"](c, results, trained, students)
        return int(any(guard["ended"] for guard in results["guard"].values()))
    except SystemExit:  # --help
        return 0
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (sdft.Diverged, KeyboardInterrupt) as error:
        print(f"\nerror: {str(error) or 'interrupted'}; no student was written", file=sys.stderr)
        return 1
    finally:
        PARTS.clear()
        PARTS.update(before)


if __name__ == "__main__":
    sys.exit(main())
