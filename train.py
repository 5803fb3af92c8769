"""Damage a language model, watch it get worse, let its healthy checkpoint teach it back, and show all three stages.

    python train.py --degrade int4                  # SmolLM2-135M-Instruct, fetched once
    python train.py --degrade ffn10,nf4 --model DIR # any GPT-2, Llama or Qwen2/2.5 folder
    python train.py --report runs                   # the tables and figures of many runs

The story, top to bottom: `prepare` reads everything, finds a user's mistakes and lists the `Stage`s; `execute` goes through them,
each of which trains or damages the student and measures it: healthy, degraded, recovered; `save` writes what came of it to --out.

Where this departs from the paper, or fills in what it leaves open, is listed in README.
"""
import argparse
import copy
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import evaluate
import fetch
import lora
import machine
import parallel
import prune
import quant
import report
import sdft
from model import GPT, frozen_copy, generate


def option(default, help, **extra):
    """A Config field: its default, the line --help shows, and further arguments for argparse."""
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@dataclass
class Config:
    """The whole configuration of a run; every field is a command-line option of the same name."""

    model: str = option("", "Hugging Face folder of the healthy model (default: SmolLM2-135M-Instruct, fetched once)")
    degrade: str = option("int4", "the damage, by commas: ffn10 (percent of the neurons removed), magnitude30, wanda30 (percent "
                          "of the weights held at zero), magnitude2:4, wanda2:4, int2 … int8, nf4; before these: forget (an "
                          "expert on --data is made, then fine-tuned on --forget-data), or a damaged model's folder; or none")
    forget_data: str = option("tooluse", "forget: what the expert is fine-tuned on, for --forget-steps at --forget-lr")
    forget_steps: int = option(20, "steps of that")
    forget_lr: float = option(3e-4, "its peak learning rate")
    expert_steps: int = option(25, "steps that make the healthy model, where forget or --bootstrap does")
    bootstrap: str = option("", "folder of a larger model that first teaches the healthy one, off-policy (§5.3)")
    importance: str = option("activation", "what ffn removes least of", choices=["activation", "weight"])
    calibration: int = option(64, "training examples that activations are taken from, for ffn and wanda")
    double_quant: bool = option(False, "nf4: quantize the scales too")
    group_size: int = option(64, "inputs that share a quantization scale; 0: one scale per output channel")
    symmetric: bool = option(True, "symmetric grid around 0, or an integer zero point")
    data: str = option("science,text", "prompts to recover on: science, tooluse, text, or files (.jsonl, text), by commas")
    eval: str = option("", "further tasks, whole .jsonl files, or text files (for perplexity) to measure only, by commas")
    text: str = option("", "UTF-8 file to measure perplexity on (default: held-out part of Python's own documentation)")
    recover: str = option("sdft", "sdft; or a baseline: kd (the teacher scores the expert's answers, not the student's), sft "
                          "(the expert's answers alone), none; several, by commas: each from the same damage")
    teacher: str = option("healthy", "healthy (as before the damage: with forget, the expert), base (--model), or a folder; "
                          "several, by commas: each from the same damage")
    cka_weight: float = option(0.0, "of 1 - CKA of student and teacher in the loss (§6)")
    cka_balance: bool = option(False, "that weight times KL / (1 - CKA), as CKA-QAD does")
    stop_after: int = option(0, "end a recovery when CKA with the healthy model, over training examples, has not risen for so "
                             "many checks, one every five steps, and go back to its best (§6); 0: never")
    ema: float = option(0.0, "how far the teacher follows the student each step (Shenfeld et al.: 0.01); 0: it stays as it is")
    demo: bool = option(True, "show the teacher of a recovery the expert demonstration")
    loss: str = option("forward_kl", "divergence between teacher and student", choices=list(sdft.LOSSES))
    steps: int = option(25, "optimizer steps")
    batch_size: int = option(16, "prompts per step, one rollout each, shared evenly by the tasks")
    micro_batch: int = option(16, "prompts that go through the models together")
    max_new_tokens: int = option(32, "longest rollout")
    text_tokens: int = option(16, "tokens of a text prompt")
    temperature: float = option(0.6, "of the rollouts")
    top_p: float = option(1.0, "nucleus of the rollouts")
    lr: float = option(1e-4, "peak learning rate of AdamW")
    warmup: int = option(2, "steps of linear warm-up; the second half of the steps decays to 0")
    weight_decay: float = option(0.0, "of AdamW")
    clip: float = option(1.0, "largest norm of the gradient")
    train_embeddings: bool = option(False, "train embeddings and head too, which the damage left as they were")
    train: str = option("full", "all weights, or a low-rank update of frozen ones (merged when saved)", choices=["full", "lora"])
    lora_rank: int = option(16, "of the update")
    lora_alpha: float = option(32.0, "the update is scaled by alpha / rank")
    moments: str = option("float32", "how AdamW keeps its two moments", choices=["float32", "bfloat16"])
    checkpointing: bool = option(False, "compute activations again in backward: less memory, more time")
    shard: bool = option(False, "under torchrun: cut parameters, gradients and optimizer states into shares (FSDP2)")
    answer_tokens: int = option(0, "longest answer in an evaluation; 0: that of its split's longest demonstration")
    eval_limit: int = option(0, "examples of each evaluation split; 0: all")
    cka_samples: int = option(64, "evaluation sequences for CKA")
    seed: int = option(0, "of the order of the data and of the rollouts")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    dtype: str = option("auto", "of computation; what is trained is float32 (auto: bfloat16 where the processor is made for it)",
                        choices=["auto", "float32", "bfloat16"])
    out: str = option("out", "folder for results.json, metrics.jsonl, student/ and report.png")
    report: str = option("", "only collect finished runs: print the tables of these folders, and what lies in them", nargs="+")


def parse(argv=None):
    """The command line as a Config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(complain(f"{message} (--help lists the options)", 2))
    for f in dataclasses.fields(Config):
        extra = dict(f.metadata) | {"help": f"{f.metadata['help']} [{f.default}]".replace(" []", "")}
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind, **extra)
    return Config(**vars(parser.parse_args(argv)))


@dataclass
class Stage:
    """One step of the story: the student is taught, or damaged, or both; then it is measured under this name."""

    name: str
    how: str = "none"       # of teaching: sdft, kd, sft, none
    teacher: str = ""       # a name in Run.models
    batches: list = ()      # of lists of sdft.Prompt
    lr: float = 0.0
    damage: str = ""        # schemes of prune.parse_damage
    loss: str = ""          # if not that of --loss


@dataclass
class Run:
    """What `prepare` made of a Config: everything that a mistake of the user's could have broken."""

    config: Config
    folder: Path
    tokenizer: data.Tokenizer
    models: dict        # who can teach: "base" and folders, frozen, in the type of computation; "healthy" comes in time
    student: GPT        # to be damaged: an ordinary model
    stages: list        # of Stage, up to the damage
    recoveries: list    # of Stage, each of which starts from the damage
    calibration: list   # of ids that activations are taken from, where any are
    sequences: dict     # task -> ids that CKA is measured on
    splits: dict        # metric name -> list of Example
    windows: dict       # metric name -> lists of ids, for perplexity
    facts: dict         # hashes and counts that results.json reports


COUNTS = ("steps", "forget_steps", "expert_steps", "batch_size", "micro_batch", "max_new_tokens", "text_tokens", "cka_samples",
          "lora_rank", "calibration")
NOT_NEGATIVE = "group_size", "answer_tokens", "eval_limit", "warmup", "weight_decay", "temperature", "cka_weight", "stop_after"
WAYS = "sdft", "kd", "sft", "none"
POSITIVE = {"lr": math.inf, "forget_lr": math.inf, "clip": math.inf, "top_p": 1}


def check_options(c):
    """ValueError for options that are out of range or do not go together."""
    for names, least in ((COUNTS, 1), (NOT_NEGATIVE, 0)):
        for name in names:
            if getattr(c, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(c, name)}")
    for name, most in POSITIVE.items():
        if not 0 < getattr(c, name) <= most:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0{' and at most 1' if most == 1 else ''}, "
                             f"not {getattr(c, name)}")
    for f in dataclasses.fields(c):
        if f.type is float and not math.isfinite(getattr(c, f.name)):
            raise ValueError(f"--{f.name.replace('_', '-')} must be a finite number, not {getattr(c, f.name)}")
    if not 0 <= c.seed < 2 ** 63:
        raise ValueError(f"--seed must be at least 0 and less than 2^63, not {c.seed}")
    if not 0 <= c.ema < 1:
        raise ValueError(f"--ema must be at least 0 and less than 1, not {c.ema}")
    for how in c.recover.split(","):
        if how not in WAYS:
            raise ValueError(f"--recover: unknown way {how!r}: choose of {', '.join(WAYS)}")
    for folder in (c.model, c.bootstrap, c.degrade.split(",")[0], *c.teacher.split(",")):
        path = Path(folder).resolve()
        if path.is_dir() and path.parent == Path(c.out).resolve() and path.name.startswith("student"):
            raise ValueError(f"{folder} lies in --out, where this run would overwrite it: choose another --out")
    if "" in c.teacher.split(",") or c.bootstrap in ("healthy", "base"):
        raise ValueError("--teacher takes names or folders by commas, none of them empty, and --bootstrap a folder")
    if c.cka_balance and not c.cka_weight:
        raise ValueError("--cka-balance scales --cka-weight: give one above 0")
    if c.cka_samples < 4 or c.stop_after and c.calibration < 4:
        raise ValueError("CKA is over --cka-samples examples, for --stop-after over --calibration: give at least 4")
    cuda = re.fullmatch(r"cuda(:(0|[1-9]\d*))?", c.device)
    if c.device != "cpu" and not (cuda and int(cuda[2] or 0) < torch.cuda.device_count()):
        raise ValueError(f"--device {c.device}: this torch sees {torch.cuda.device_count()} CUDA devices; try --device cpu")
    if c.train == "lora" and c.train_embeddings:
        raise ValueError("--train lora trains low-rank updates alone: leave out --train-embeddings")
    if c.shard and parallel.size() == 1:
        raise ValueError("--shard cuts the student into shares for several processes; start with torchrun --nproc_per_node N")
    if c.batch_size % parallel.size():
        raise ValueError(f"--batch-size {c.batch_size} cannot be shared evenly by {parallel.size()} processes")


def prepare(c):
    """Read and check everything; ValueError or OSError, in one line, for a user's mistake."""
    check_options(c)
    start, damage = split_damage(c.degrade)
    if c.dtype == "auto":
        c.dtype = "bfloat16" if machine.bfloat16_is_fast(c.device) else "float32"
    tasks = [data.load_task(name) for name in c.data.split(",")]
    forgetting = [data.load_task(name) for name in c.forget_data.split(",")] if start == "forget" else []
    trained = c.data.split(",") + (c.forget_data.split(",") if forgetting else [])
    further = [data.load_task(name, True) for name in c.eval.split(",") if name and not is_text(name) and name not in trained]
    if not all(task.eval for task in further):
        raise ValueError(f"--eval {c.eval}: the task 'text' has no questions; for perplexity give a file of text")
    text = data.read_text(c.text) if c.text else data.split_text()[1]
    check_names({*trained, *c.eval.split(",")} - {""})
    with parallel.first():
        folder = Path(c.model) if c.model else fetch.default_model()
    tokenizer = data.load_tokenizer(folder)
    models, student = read_models(c, folder, start, damage, tokenizer, text[:4000])
    stages, recoveries = plan(c, start, damage, tokenizer, tasks, forgetting)

    measured = {t.name: t for t in [*tasks, *forgetting, *further] if t.eval}  # a text may have the name of a task
    splits = {f"{t.name}_{name}": evaluate.spread(es, c.eval_limit) for t in measured.values() for name, es in t.eval.items()}
    texts = {"perplexity": text} | {f"perplexity_{Path(t).stem}": data.read_text(t) for t in c.eval.split(",") if is_text(t)}
    context = min(m.config.context_length for m in [student, *models.values()])
    windows = {metric: data.text_windows(tokenizer, text, length=min(256, context)) for metric, text in texts.items()}
    needed = "ffn" in damage or "wanda" in damage or c.stop_after
    calibration = evaluate.calibration_sequences(c, tokenizer, tasks) if needed else []
    sequences = evaluate.cka_sequences(c, tokenizer, [*tasks, *forgetting], windows["perplexity"])
    check_prompts(c, [*stages, *recoveries], splits, [*sequences.values(), calibration], tokenizer, context)
    facts = {"model": str(folder), "parameters": sum(p.numel() for p in student.parameters()), "damage": {},
             "data_sha256": sha256(repr([[(e.prompt, e.response) for e in t.train] for t in tasks])),
             "eval_sha256": sha256(repr([[(e.prompt, e.response) for e in es] for es in splits.values()])),
             "eval_examples": {name: len(es) for name, es in splits.items()},
             "text_sha256": sha256(text), "text_tokens": sum(map(len, windows["perplexity"])),
             "text_window": len(windows["perplexity"][0]), "context_length": student.config.context_length}
    if parallel.rank() == 0:
        prepare_out(Path(c.out))
    return Run(c, folder, tokenizer, models, student, stages, recoveries, calibration, sequences, splits, windows, facts)


def read_models(c, folder, start, damage, tokenizer, text):
    """Who can teach, by name, and the student, not yet damaged by us; ValueError where they do not go together."""
    dtype = getattr(torch, c.dtype)
    student = GPT.from_pretrained(folder, dtype if c.train == "lora" else torch.float32, c.device)
    models = {"base": frozen_copy(student, dtype)}
    folders = {*c.teacher.split(","), c.bootstrap} - {"healthy", "base", ""}
    for name in sorted(folders):
        models[name] = GPT.from_pretrained(name, dtype, c.device).eval().requires_grad_(False)
    for name in sorted(folders | {start} - {"", "forget"}):
        other, chat = data.load_tokenizer(name), [{"role": "user", "content": text}]
        if other.encode(text) != tokenizer.encode(text) or other.chat(chat) != tokenizer.chat(chat):
            raise ValueError(f"{name}: its tokenizer must be that of the healthy model, {folder}")
    if start not in ("", "forget"):
        if c.bootstrap:
            raise ValueError(f"--bootstrap makes the healthy model, and {start} is a damaged one: leave out one of them")
        student = GPT.from_pretrained(start, dtype if c.train == "lora" else torch.float32, c.device)
        if student.config.n_layer != models["base"].config.n_layer:
            raise ValueError(f"{start} has {student.config.n_layer} layers and {folder} {models['base'].config.n_layer}")
    highest, known = max(tokenizer.bytes_of), min(m.config.vocab_size for m in [student, *models.values()])
    if highest >= known:
        raise ValueError(f"{folder}: its tokenizer has the id {highest}, but a model of this run knows only {known} ids")
    prune.check_damage(student.config, damage, c.group_size)
    for name in c.teacher.split(","):
        theirs = models.get(name, models["base"]).config  # the healthy model has the shape of the base
        if c.ema and (theirs != student.config or "ffn" in damage):
            raise ValueError(f"--ema: a teacher can only follow a student of its own shape, and {name} is of another")
        if "sdft" in c.recover and theirs.vocab_size < student.config.vocab_size:
            raise ValueError(f"{name} knows {theirs.vocab_size} ids and the student may say any of {student.config.vocab_size}: "
                             "it can teach by --recover kd")
        if c.cka_weight and theirs.n_layer != student.config.n_layer:
            raise ValueError(f"--cka-weight: {name} has {theirs.n_layer} layers and the student {student.config.n_layer}")
    return models, student


def plan(c, start, damage, tokenizer, tasks, forgetting):
    """The stages up to the damage, and the recoveries from it."""
    def prompts(tasks, steps, order, student=False, teacher=True):
        """Batches of sdft.Prompt, where those of the two that are true see the demonstration."""
        return [[sdft.Prompt(data.teacher_prompt(tokenizer, e, student, c.text_tokens),
                             data.teacher_prompt(tokenizer, e, teacher, c.text_tokens),
                             data.expert_answer(tokenizer, e, c.text_tokens, c.max_new_tokens)) for e in batch]
                for batch in data.batches(tasks, steps, c.batch_size, order)]

    stages, degraded = [Stage("healthy")], Stage("degraded", damage=damage)
    if c.bootstrap:  # Fig. 7 writes KL(3B || 7B)
        first = prompts(tasks, c.expert_steps, f"expert {c.seed}", student=True)
        stages = [Stage("base"), Stage("healthy", "kd", c.bootstrap, first, c.lr, loss="reverse_kl")]
    elif start == "forget":
        stages = [Stage("base"), Stage("healthy", "sdft", "base", prompts(tasks, c.expert_steps, f"expert {c.seed}"), c.lr)]
    if start == "forget":
        degraded = Stage("degraded", "sft", "", prompts(forgetting, c.forget_steps, f"forget {c.seed}"), c.forget_lr, damage)
    stages += [degraded] if start or damage else []
    batches, recoveries = prompts(tasks, c.steps, c.seed, teacher=c.demo), []
    for how in c.recover.split(","):
        for i, teacher in enumerate(c.teacher.split(",") if how in ("sdft", "kd") else [""]):
            who = teacher if teacher in ("", "base", "healthy") else f"teacher{i + 1}"
            name = ["recovered"] + [how] * ("," in c.recover) + [who] * ("," in c.teacher and who != "")
            recoveries.append(Stage("_".join(name), how, teacher, batches, c.lr))
    if len({stage.name for stage in recoveries}) < len(recoveries):
        raise ValueError("--recover and --teacher must not name anything twice")
    return stages, recoveries


def is_text(name):
    """Whether a name of --eval is a file of text."""
    return Path(name).is_file() and Path(name).suffix != ".jsonl"


def split_damage(text):
    """--degrade -> (forget, the folder of a damaged model, or ""; the schemes of `prune.parse_damage`). ValueError for others."""
    first, _, rest = text.partition(",")
    if first == "forget" or Path(first).is_dir() and not prune.DAMAGES.fullmatch(first) and first != "none":
        start, schemes = first, rest
    else:
        start, schemes = "", "" if text == "none" else text
    if schemes:
        prune.parse_damage(schemes)
    return start, schemes


def check_names(names):
    """ValueError if two tasks or files would be measured under one name, or a task as if it were a text."""
    for name in sorted(names):
        if not is_text(name) and Path(name).stem.startswith("perplexity"):
            raise ValueError(f"{name}: its metric would be taken for a perplexity: rename the file")
    metrics = ["perplexity_" * is_text(name) + Path(name).stem for name in names]
    for metric in sorted(metrics):
        if metrics.count(metric) > 1:
            raise ValueError(f"--data, --eval: {metrics.count(metric)} of them would be measured as {metric!r}: rename a file")


def check_prompts(c, stages, splits, sequences, tokenizer, context_length):
    """ValueError for prompts that do not fit the context with their answers, or have no expert's answer where one is learned."""
    longest = [len(ids) for group in sequences for ids in group]
    for stage in stages:
        for p in (p for batch in stage.batches for p in batch):
            if stage.how in ("kd", "sft") and not p.answer:
                raise ValueError(f"{stage.how} needs answers: some text ends within --text-tokens {c.text_tokens}; give fewer")
            prompt = p.student if stage.how == "sft" else p.teacher
            longest.append(len(prompt) + (len(p.answer) if stage.how in ("kd", "sft") else c.max_new_tokens))
    for es in splits.values():
        longest += [len(tokenizer.encode(context)) + len(tokenizer.encode(text)) for e in es for context, text in e.choices]
        longest.append(max(len(data.student_prompt(tokenizer, e)) for e in es) + evaluate.answer_tokens(c, tokenizer, es))
    if max(longest) > context_length:
        raise ValueError(f"a prompt with its answer takes {max(longest)} tokens, "
                         f"more than the model's context of {context_length}")


def prepare_out(out):
    """Make --out, last of all, and take away an earlier run's results, which a run that dies would leave standing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").unlink(missing_ok=True)
        (out / "metrics.jsonl").write_text("")
    except OSError as error:
        raise OSError(f"cannot write to --out {out}: {error.strerror}; choose another folder") from None


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------- The job

def execute(run):
    """Go through the stages; returns results.json's content, the Measurements, and the recovered students, by stage."""
    c, seconds, stages, students, states = run.config, {}, {}, {}, None
    dtype = getattr(torch, c.dtype)

    def go(student, stage):
        """The student, taught and damaged; what it is now is measured, and may teach."""
        nonlocal states
        if stage.how != "none":
            student = trainable_(c, student, run.models["base"])
            with machine.timed(seconds, stage.name + " training"):
                teach_(run, student, stage)
            student = parallel.plain_copy(student, torch.float32)
        if stage.damage:
            run.facts["damage"] = prune.damage_(student, stage.damage, run.calibration, c.importance, c.group_size or None,
                                                c.symmetric, c.double_quant)
        with machine.timed(seconds, stage.name):
            if stage.how == "none" and stage in run.recoveries:
                stages[stage.name] = stages["degraded"]
                return student
            untouched = stage.how == "none" and stage.name in ("base", "healthy")
            model = run.models["base"] if untouched else frozen_copy(student, dtype)
            stages[stage.name] = evaluate.measure(run, model, states)
            if stage.name == "healthy":
                states, run.models["healthy"] = evaluate.states_of(run, model), model
        return student

    for stage in run.stages:
        run.student = go(run.student, stage)
    stages.setdefault("degraded", stages["healthy"])  # --degrade none
    for i, stage in enumerate(run.recoveries):  # whoever waits, or is done, does so beside the CPU
        last = i + 1 == len(run.recoveries)
        student = go((run.student if last else copy.deepcopy(run.student.cpu())).to(c.device), stage)
        students[stage.name] = student.cpu() if parallel.rank() == 0 else None

    fractions = {stage.name: {m: evaluate.recovered_fraction(stages["healthy"], stages["degraded"], stages[stage.name], m)
                              for m in stages["healthy"].items} for stage in run.recoveries}
    levels = dict.fromkeys(level for m in stages.values() for level in m.cka)
    results = {"config": dataclasses.asdict(c), "environment": environment(run),
               "stages": {name: {metric: m.value(metric) for metric in m.items} for name, m in stages.items()},
               "recovered_fraction": fractions.get("recovered", fractions),
               "cka": {level: {name: m.cka[level] for name, m in stages.items() if m.cka} for level in levels},
               "cka_layers": {name: m.layers for name, m in stages.items() if m.layers},
               "seconds": seconds}
    return results, stages, students


def trainable_(c, student, base):
    """The student, damaged or not, made ready to be trained, in place."""
    for name, p in student.named_parameters():
        p.requires_grad_(c.train_embeddings or not name.startswith(("embed_", "lm_head")))
    if c.train == "lora":
        lora.add_lora_(student, c.lora_rank, c.lora_alpha, torch.Generator().manual_seed(c.seed))
    quant.compute_in_(student, getattr(torch, c.dtype))
    there = dict(base.named_parameters())
    for name, p in student.named_parameters():  # what is not trained need not be there twice
        same = there.get(name.replace("parametrizations.", "").removesuffix(".original"))
        if not p.requires_grad and same is not None and (same.dtype, same.shape) == (p.dtype, p.shape) and torch.equal(same, p):
            p.data = same.data
    student.checkpointing = c.checkpointing
    if c.shard:
        parallel.shard_(student)
    return student


def teach_(run, student, stage):
    """Train the student as the stage says; a line a step goes to metrics.jsonl."""
    c, dtype, writer = run.config, getattr(torch, run.config.dtype), parallel.rank() == 0
    generator = torch.Generator().manual_seed(c.seed)

    def rollout(student, prompts):
        return parallel.gather(generate(
            parallel.whole(student, dtype), prompts, c.max_new_tokens, c.temperature, c.top_p, run.tokenizer.eos_id, generator,
            batch_size=c.batch_size, rows=parallel.share(range(len(prompts)))))

    with open(Path(c.out) / "metrics.jsonl" if writer else os.devnull, "a", encoding="utf-8") as file:
        settings = dict(micro_batch=c.micro_batch, lr=stage.lr, warmup=c.warmup, weight_decay=c.weight_decay, clip=c.clip,
                        moments=getattr(torch, c.moments), progress=stage.name if writer else "",
                        log=lambda line: print(report.to_json({"stage": stage.name, **line}), file=file, flush=True))
        watch = None
        if c.stop_after and stage in run.recoveries:
            watch = settings["after_step"] = evaluate.Watch(student, run.models["healthy"], run.calibration, c.stop_after)
        if stage.how == "sft":
            sdft.sft(student, stage.batches, **settings)
        else:
            teacher = run.models[stage.teacher]
            if stage in run.recoveries:
                teacher = frozen_copy(teacher, dtype) if c.ema else teacher
                settings |= dict(ema=c.ema, cka_weight=c.cka_weight, cka_balance=c.cka_balance)
            sdft.recover(student, teacher, stage.batches, rollout if stage.how == "sdft" else None,
                         loss=sdft.LOSSES[stage.loss or c.loss], **settings)
        if watch:
            watch.restore()


def environment(run):
    """Everything a number depends on and a reader cannot see."""
    device = run.config.device
    gpu_memory = {} if device == "cpu" else {"peak_gpu_memory_gib": torch.cuda.max_memory_allocated(device) / 2 ** 30}
    return {**run.facts, "python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
            "processor": machine.processor(device), "threads": torch.get_num_threads(),
            "processes": parallel.size(), "date": datetime.datetime.now().isoformat(timespec="minutes"),
            "peak_memory_gib": machine.peak_memory_gib(), **gpu_memory}


def save(run, results, students):
    """DIR/student (a folder that this project and transformers load), of several one each, and DIR/results.json."""
    out = Path(run.config.out)
    for stage, student in students.items():
        folder = out / stage.replace("recovered", "student")
        student.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                     "generation_config.json", "chat_template.jinja"):
            if (run.folder / name).exists():
                shutil.copy(run.folder / name, folder / name)
    (out / "results.json.part").write_text(report.to_json(results, indent=1) + "\n", encoding="utf-8")
    os.replace(out / "results.json.part", out / "results.json")


def main(argv=None):
    """The command line; returns the exit code, 2 for a user's mistake."""
    config = parse(argv)
    if config.report:
        return collected(config) if parallel.first_to_speak() else 0
    config.device = parallel.start(config.device)
    try:
        with parallel.together():
            try:
                run = prepare(config)
            except ValueError as error:
                return complain(error, 2)
            results, stages, students = execute(run)
            if parallel.rank() == 0:
                save(run, results, students)
    except OSError as error:
        return complain(error, 2)
    except (parallel.PeerLost, KeyboardInterrupt) as stopped:
        why = "interrupted" if isinstance(stopped, KeyboardInterrupt) else "another process of this run has died"
        return complain(f"{why}; {config.out}/results.json and student/ were not written", 1)
    if parallel.rank() == 0:
        print(report.text(results, {name: m.answers for name, m in stages.items()}))
        steps = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
        report.draw(results, steps, Path(config.out) / "report.png")
        folders = ", ".join(stage.replace("recovered", "student") + "/" for stage in students)
        print(f"wrote {config.out}/results.json, metrics.jsonl, {folders}")
    parallel.stop()
    return 0


def collected(config):
    """--report: the tables of many runs on standard output, their picture in --out; the exit code."""
    try:
        runs = report.read_runs(config.report, dataclasses.asdict(Config()))
        print(report.tables(runs))
        report.draw_runs(runs, Path(config.out))
    except (ValueError, OSError) as error:
        return complain(error, 2)
    return 0


def complain(error, code):
    """One line, from one process; returns the exit code."""
    if parallel.first_to_speak():
        print(f"\nerror: {error}" if code == 1 else f"error: {error}", file=sys.stderr)  # 1: a progress bar was left standing
    return code


if __name__ == "__main__":
    sys.exit(main())
