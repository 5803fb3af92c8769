"""A Config made into a Run: everything is read and checked here, before anything is written.

`prepare` raises ValueError or OSError, in one line, for each mistake of a user's.
"""
import dataclasses
import hashlib
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import data
import evaluate
import parallel
import quant
import resume
import sdft
from damage import check_groups, parse_damage, put_on_grid, remove_neurons
from files import require
from model import GPT, frozen_copy, generate

WAYS = "sdft", "kd", "sft", "own", "none"


@dataclass
class Lesson:
    """One training: who learns, in which way, from whom, on what, how fast."""

    stage: str          # what comes of it: healthy, degraded, recovered…
    how: str            # sdft, kd, sft, own; or none
    teacher: str        # a name in Run.teachers; "" for sft
    batches: list       # of lists of sdft.Prompt
    lr: float
    loss: str           # a name in sdft.LOSSES
    recovery: bool = False
    held_out: dict = dataclasses.field(default_factory=dict)  # task -> [Prompt]


@dataclass
class Run:
    """What `prepare` made of a Config, and what `execute` makes of that."""

    config: object                   # train.Config
    folder: Path                     # of the healthy model
    teachers: dict                   # name -> GPT, frozen: base, folders; healthy comes in time
    student: GPT                     # to be damaged
    expert: Lesson | None            # §5.1, §5.3: makes the healthy model
    forgetting: Lesson | None        # §5.1: makes the degraded one, before any other damage
    recoveries: list                 # of Lesson, each from the same damage
    calibration: list                # ids that activations are taken from, where any are
    evaluation: evaluate.Evaluation  # what is measured
    samples: dict                    # task -> [Example] of its training prompts: ask the teacher
    facts: dict                      # hashes and counts that results.json reports
    score: object                    # sdft.score, or a faster one
    backward: object                 # sdft.backward, or a faster one
    generate: object                 # model.generate, or a faster one
    stages: dict = dataclasses.field(default_factory=dict)   # name -> evaluate.Measurement
    seconds: dict = dataclasses.field(default_factory=dict)
    shown: dict = dataclasses.field(default_factory=dict)    # stage -> a step, token by token
    asked: dict = dataclasses.field(default_factory=dict)    # teacher -> guard.check_teacher
    guard: dict = dataclasses.field(default_factory=dict)    # stage -> checks, kept, ended
    lines: list = dataclasses.field(default_factory=list)    # of metrics.jsonl
    measured: dict = dataclasses.field(default_factory=dict)  # stages, by an earlier process
    trained: list = dataclasses.field(default_factory=list)  # stages whose student is saved
    training: dict | None = None                             # of an earlier process, unfinished
    saves: int = 0                                           # how many checkpoints were written
    checkpoint: Path | None = None                           # their folder
    identity: dict | None = None                             # what makes this run this run
    machine: dict | None = None                              # that it was begun on
    full: bool = False                                       # the disk: no more checkpoints
    lock: int | None = None                                  # on --out
    interrupt: object = dataclasses.field(default_factory=resume.Interrupt)
    kept: evaluate.Healthy | None = None                     # of the healthy model, to compare with
    along: dict = dataclasses.field(default_factory=dict)    # stage -> points of its training


def prepare(c):
    """Read and check everything; ValueError or OSError, in one line, for a user's mistake."""
    default_damage_(c)
    check_options(c)
    if c.dtype == "auto":
        c.dtype = "bfloat16" if parallel.bfloat16_is_fast(c.device) else "float32"
    score, backward, generate = implementation(c)
    tasks, forgetting, further = read_tasks(c)
    dropped = drop_measured_([*tasks, *forgetting], further)
    tasks, held_out = hold_out(tasks)
    texts = read_texts(c)
    paths = resolve_models(c)
    folder = paths[c.model]
    tokenizer = data.load_tokenizer(folder)
    examples = [e for task in [*tasks, *forgetting, *further]
                for of in (task.train, *task.eval.values()) for e in of]
    examples += itertools.chain(*held_out.values())
    data.check_special_tokens(tokenizer, examples)
    teachers, student = read_models(c, paths, tokenizer, texts["perplexity"][:4000])
    check_models(c, teachers, student, tokenizer)
    context = min(m.config.context_length for m in [student, *teachers.values()])
    windows = windows_of(tokenizer, texts, context)
    evaluation = evaluate.Evaluation(
        tokenizer, splits_of([*tasks, *forgetting, *further], c.eval_limit), windows,
        evaluate.cka_sequences(c, tokenizer, [*tasks, *forgetting], windows["perplexity"]),
        c.eval_tokens, generate, score)
    rates = learning_rates(c, student)
    expert, damaging = plan_history(c, tokenizer, tasks, held_out, forgetting, rates)
    recoveries = plan_recoveries(c, tokenizer, tasks, held_out, rates["lr"])
    run = Run(c, folder, teachers, student, expert, damaging, recoveries,
              calibration_of(c, tokenizer, tasks), evaluation, samples_of(c, tasks),
              facts(folder, student, tasks, evaluation, texts) | hashes(c, paths, examples, texts)
              | rates | {"left_out": dropped},
              score, backward, generate)
    check_lengths(run, context, examples)
    return run


def default_damage_(c):
    """Without --degrade: int4; nothing more where other options make a damaged model, or a healthy
    one by --bootstrap."""
    if not c.degrade:
        c.degrade = "none" if c.student or c.forget or c.bootstrap else "int4"


def check_options(c):
    """ValueError for options that are out of range or do not go together."""
    damages, teachers, ways = parse_damage(c.degrade), c.teacher.split(","), c.recover.split(",")
    for how in ways:
        require(how in WAYS, f"--recover: unknown way {how!r}: choose of {', '.join(WAYS)}")
    for folder in (c.model, c.bootstrap, c.student, *teachers):
        path = Path(folder).resolve()
        inside = path.is_dir() and path.parent == Path(c.out).resolve()
        require(not (inside and path.name.startswith("student")),
                f"{folder} lies in --out, where this run would overwrite it: choose another --out")
    require("" not in teachers and c.bootstrap not in ("healthy", "base"),
            "--teacher takes names or folders by commas, none empty, and --bootstrap a folder")
    for many in (ways, teachers):
        require(len(set(many)) == len(many), "--recover and --teacher must not name anything twice")
    for history in ("bootstrap", "forget"):
        require(not (c.student and getattr(c, history)),
                f"--student is a damaged model, and --{history} makes a healthy one: leave out one")
    require(c.cka_weight or not c.cka_balance,
            "--cka-balance scales --cka-weight: give one above 0")
    require_use(c, ways)
    require(c.calibration >= 4 or c.watch != "cka",
            "--watch cka is CKA over --calibration examples: give at least 4")
    require(all(re.fullmatch(r"0?\.\d+", part) for part in parts_of(c)),
            f"--interpolate {c.interpolate}: give parts of the way, such as 0.25,0.5,0.75")
    require(not (c.interpolate and c.shard), "--interpolate goes without --shard")
    require(not (c.lora and c.train_embeddings),
            "--lora trains low-rank updates alone: leave out --train-embeddings")
    require(not (c.ema and any(what is remove_neurons for what, _ in damages)),
            "--ema: a teacher can only follow a student of its own shape; ffn changes it")
    cuda, seen = re.fullmatch(r"cuda(:(0|[1-9]\d*))?", c.device), torch.cuda.device_count()
    require(c.device == "cpu" or cuda and int(cuda[2] or 0) < seen,
            f"--device {c.device}: this torch sees {seen} CUDA devices; try --device cpu")
    n = parallel.size()
    require(n > 1 or not c.shard, "--shard cuts the student into shares for several processes; "
                                  "start with torchrun --nproc_per_node N")
    require(c.batch_size % n == 0,
            f"--batch-size {c.batch_size} cannot be shared evenly by {n} processes")


def require_use(c, ways):
    """ValueError for an option of a way of recovery that --recover does not name: nothing would
    come of it, and the results would say that it had been there."""
    for options, of in ((("cka_weight", "ema", "skip_tokens"), ("sdft", "kd")),
                        (("anchor",), ("sft",))):
        for option in options:
            require(not getattr(c, option) or {*of} & {*ways},
                    f"--{option.replace('_', '-')} is of --recover {' or '.join(of)}, and "
                    f"{c.recover} has no use for it: leave it out")


def parts_of(c):
    """The parts of --interpolate, as they were typed."""
    return c.interpolate.split(",") if c.interpolate else []


def implementation(c):
    """(score, backward, generate): the plain ones, or those of fast.py, which equal them."""
    if c.plain:
        return sdft.score, sdft.backward, generate
    import fast
    fast.keep_freed_memory()
    return fast.score, fast.backward, fast.generate


def splits_of(tasks, limit):
    """{metric: examples} of every task that has questions, each once, at most limit a split."""
    measured = {task.name: task for task in tasks if task.eval}  # a text may have a task's name
    return {f"{task.name}_{split}": evaluate.spread(examples, limit)
            for task in measured.values() for split, examples in task.eval.items()}


def windows_of(tokenizer, texts, context):
    """{metric: windows of its text}: 256 ids each, after what the tokenizer puts before a text."""
    length, windows = min(256, context - len(tokenizer.prefix)), {}
    for metric, text in texts.items():
        found = data.text_windows(tokenizer, text, length=length)
        windows[metric] = [[*tokenizer.prefix, *ids] for ids in found]
    return windows


def calibration_of(c, tokenizer, tasks):
    """Ids that activations are taken from, if anything takes them."""
    needed = c.watch == "cka"
    for what, match in parse_damage(c.degrade):
        needed |= what is not put_on_grid and match.groupdict().get("method") != "magnitude"
    return evaluate.calibration_sequences(c, tokenizer, tasks) if needed else []


def read_tasks(c):
    """Tasks to recover on, tasks to forget by, and further ones that are only measured."""
    trained, lost = c.data.split(","), c.forget.split(",") if c.forget else []
    tasks, forgetting = ([data.load_task(name) for name in names] for names in (trained, lost))
    by_name, further = dict(zip([*trained, *lost], [*tasks, *forgetting])), []
    for name in c.eval.split(",") if c.eval else []:
        if name not in by_name:
            require(not data.is_text(name), f"--eval {name}: a text has no questions; for its "
                                            "perplexity name a file in --text")
            by_name[name] = data.load_task(name, measured_only=True)
            further.append(by_name[name])
    metrics = [task.name for task in by_name.values() if task.eval]  # a text is not measured so
    for metric in sorted(metrics):
        require(not metric.startswith("perplexity"),
                f"{metric}: its metric would be taken for a perplexity: rename the file")
        n = metrics.count(metric)
        require(n == 1, f"--data, --eval: {n} of them would be measured as {metric!r}: rename one")
    return tasks, forgetting, further


def drop_measured_(tasks, further):
    """Take from each task, in place, the training examples that another file asks as a question of
    its own: public train and test files share a few. Returns {task: how many}."""
    dropped = {}
    for task in tasks:
        others = [t for t in [*tasks, *further] if t.name != task.name]
        measured = {data.asked(e): e.where for t in others
                    for examples in t.eval.values() for e in examples}
        left = []
        for e in task.train:
            where = measured.get(data.asked(e)) if e.chat else None  # "": of a built-in task
            if where is None or not (where or e.where):
                left.append(e)
        require(left, f"{task.name}: each of its questions is measured by another file, too: "
                      "nothing is left to train on")
        if len(left) < len(task.train):
            dropped[task.name] = len(task.train) - len(left)
        task.train = left
    return dropped


HELD_OUT = 16  # prompts of each task that are never trained on: the guard's


def hold_out(tasks):
    """(the tasks without them, {task: [Example] that are held out})."""
    left, held_out = [], {}
    for task in tasks:
        rest, examples = data.hold_out(task, HELD_OUT)
        left.append(rest)
        held_out.setdefault(task.name, []).extend(examples)
    return left, held_out


def samples_of(c, tasks):
    """{task: [Example]}: the training prompts that a teacher is asked before it teaches."""
    found = {}
    for task in tasks if c.teacher_check else []:
        graded = [e for e in task.train if e.chat and e.check]
        if graded:
            found[task.name] = evaluate.spread(graded, c.teacher_check)
    return found


def read_texts(c):
    """{metric: text} of --text; the first is `perplexity`, others add the file's name to it."""
    texts = {}
    for name in c.text.split(","):
        metric = f"perplexity_{Path(name).stem}" if texts else "perplexity"
        require(metric not in texts, f"--text: two would be measured as {metric!r}: rename a file")
        require(name == "python" or Path(name).is_file(), f"--text: there is no file {name!r}")
        texts[metric] = data.split_text()[1] if name == "python" else data.read_prose(name)
    return texts


def resolve_models(c):
    """{name, as the user gave it: the path of that folder or GGUF file}; "" is the default model.

    The first process fetches what is not there.
    """
    named = {*c.teacher.split(",")} - {"healthy", "base"} | {c.model, c.student, c.bootstrap}
    with parallel.first():
        paths = {name: checkpoint.resolve(name) for name in sorted(named - {""})}
        if not c.model:
            paths[""] = checkpoint.default_model()
    return paths


def read_models(c, paths, tokenizer, text):
    """Who can teach, by name, and the student, not yet damaged by us."""
    dtype = getattr(torch, c.dtype)
    own = dtype if c.lora else torch.float32  # what the student is held in
    student = GPT.from_pretrained(paths[c.model], own, c.device)
    teachers = {"base": frozen_copy(student, dtype)}
    folders = {*c.teacher.split(","), c.bootstrap} - {"healthy", "base", ""}
    for name in sorted(folders):
        teacher = GPT.from_pretrained(paths[name], dtype, c.device)
        teachers[name] = teacher.eval().requires_grad_(False)
    for name in sorted(folders | {c.student} - {""}):
        other, chat = data.load_tokenizer(paths[name]), [{"role": "user", "content": text}]
        same = other.encode(text) == tokenizer.encode(text)
        require(same and other.chat(chat) == tokenizer.chat(chat),
                f"{name}: its tokenizer must be that of the healthy model, {paths[c.model]}")
    if c.student:
        student = GPT.from_pretrained(paths[c.student], own, c.device)
    return teachers, student


def check_models(c, teachers, student, tokenizer):
    """ValueError where models do not go together, or with the tokenizer or the damage."""
    ours, base = student.config, teachers["base"].config
    require(ours.n_layer == base.n_layer, f"--student {c.student} has {ours.n_layer} layers and "
                                          f"the healthy model {base.n_layer}")
    known = min(m.config.vocab_size for m in [student, *teachers.values()])
    require(max(tokenizer.bytes_of) < known, f"the tokenizer has the id {max(tokenizer.bytes_of)}, "
                                             f"but a model of this run knows only {known} ids")
    check_groups(ours, c)
    for name in c.teacher.split(","):
        theirs = teachers.get(name, teachers["base"]).config  # healthy has the shape of base
        require(not c.ema or theirs == ours, f"--ema: a teacher can only follow a student of its "
                                             f"own shape, and {name} is of another")
        require("sdft" not in c.recover or theirs.vocab_size >= ours.vocab_size,
                f"{name} knows {theirs.vocab_size} ids and the student may say any of "
                f"{ours.vocab_size}: it can teach by --recover kd")
        require(not c.cka_weight or theirs.n_layer == ours.n_layer,
                f"--cka-weight: {name} has {theirs.n_layer} layers and the student {ours.n_layer}")


FORGET = 1.56e-3  # the learning rate of forgetting, as a fraction of the weights' RMS
LORA = 10         # how many times larger the learning rate of low-rank updates is


def learning_rates(c, student):
    """{"lr", "forget_lr", "weights_rms"}: the peak learning rates, and what they are fractions of,
    the root mean square of the blocks' weights.

    A step is then equally large in every model; `sdft.rates` makes it so in every matrix.
    """
    weights = [linear.weight.detach() for linear in quant.block_linears(student)]
    squares = sum(w.float().square().sum().item() for w in weights)
    rms = math.sqrt(squares / sum(w.numel() for w in weights))
    usual = rms * (LORA if c.lora else 1)
    return {"lr": c.lr or c.lr_fraction * usual, "forget_lr": c.forget_lr or FORGET * usual,
            "weights_rms": rms}


def prompt_of(c, tokenizer, e, student="none", teacher="turn"):
    """An Example as sdft.Prompt; each side sees it in one of the forms of data.DEMOS."""
    views = (data.teacher_prompt(tokenizer, e, demo, c.text_prompt_tokens)
             for demo in (student, teacher))
    answer = data.expert_answer(tokenizer, e, c.text_prompt_tokens, c.rollout_tokens)
    return sdft.Prompt(*views, answer)


def lesson_of(c, tokenizer, tasks, held_out, steps, order, **views):
    """{"batches", "held_out"} of a Lesson, as its two sides see them."""
    batches = [[prompt_of(c, tokenizer, e, **views) for e in batch]
               for batch in data.batches(tasks, steps, c.batch_size, order)]
    watched = {name: [prompt_of(c, tokenizer, e, **views) for e in examples]
               for name, examples in held_out.items()}
    return {"batches": batches, "held_out": watched}


def plan_history(c, tokenizer, tasks, held_out, forgetting, rates):
    """(what makes the healthy model, what makes it forget): a Lesson each, or None."""
    expert, damaging, order = None, None, f"expert {c.seed}"
    demo = "turn" if c.demo == "none" else c.demo  # --demo none is of the recovery alone
    if c.bootstrap:  # both see the demonstration; Fig. 7 writes KL(3B || 7B)
        learned = lesson_of(c, tokenizer, tasks, held_out, c.expert_steps, order,
                            student=demo, teacher=demo)
        expert = Lesson("healthy", "kd", c.bootstrap, lr=rates["lr"], loss="reverse_kl", **learned)
    elif c.forget:
        learned = lesson_of(c, tokenizer, tasks, held_out, c.expert_steps, order, teacher=demo)
        expert = Lesson("healthy", "sdft", "base", lr=rates["lr"], loss=c.loss, **learned)
    if c.forget:
        learned = lesson_of(c, tokenizer, forgetting, {}, c.forget_steps, f"forget {c.seed}")
        damaging = Lesson("degraded", "sft", "", lr=rates["forget_lr"], loss=c.loss, **learned)
    return expert, damaging


def plan_recoveries(c, tokenizer, tasks, held_out, lr):
    """A Lesson for each way of --recover by each --teacher."""
    lessons = []
    learned = lesson_of(c, tokenizer, tasks, held_out, c.steps, c.seed, teacher=c.demo)
    for how in c.recover.split(","):
        taught = how in ("sdft", "kd", "own")
        for i, teacher in enumerate(c.teacher.split(",") if taught else [""]):
            words = ["recovered"] + ([how] if "," in c.recover else [])
            if taught and "," in c.teacher:
                words.append(teacher if teacher in ("base", "healthy") else f"teacher{i + 1}")
            stage = "_".join(words)
            lessons.append(
                Lesson(stage, how, teacher, lr=lr, loss=c.loss, recovery=True, **learned))
    return lessons


def check_lengths(run, context_length, examples):
    """ValueError for prompts that do not fit the context with their answers."""
    sequences = [*run.calibration, *itertools.chain(*run.evaluation.sequences.values())]
    found = [*lesson_lengths(run), *answer_lengths(run), *((len(ids), ids) for ids in sequences)]
    longest, whose = max(found, key=lambda pair: pair[0])
    if longest <= context_length:
        return
    if not isinstance(whose, str):
        whose = where_of(whose, run.evaluation.tokenizer, examples)
    raise ValueError(f"{whose and whose + ': '}a prompt with its answer takes {longest} tokens, "
                     f"more than the model's context of {context_length}")


def lesson_lengths(run):
    """[(tokens of a prompt with its answer, the student's ids)] of all that is trained on."""
    found = []
    for lesson in filter(None, [run.expert, run.forgetting, *run.recoveries]):
        given = lesson.how in ("kd", "sft")  # else the answer is a rollout, or the teacher's own
        for p in itertools.chain(*lesson.batches) if lesson.how != "none" else ():
            prompt = p.student if lesson.how == "sft" else p.teacher
            answer = len(p.answer) if given else run.config.rollout_tokens
            found.append((len(prompt) + answer, p.student))
        for p in itertools.chain(*lesson.held_out.values()) if lesson.how != "none" else ():
            prompt = p.student if lesson.how == "sft" else p.teacher
            found.append((len(prompt) + len(p.answer), p.student))
    return found


def answer_lengths(run):
    """[(tokens, file and line)]: for each group that is asked its longest prompt with its longest
    answer, and the row that has the longer of the two; and each choice after its context."""
    evaluation, found = run.evaluation, []
    tokenizer = evaluation.tokenizer
    taught = any(lesson.teacher for lesson in run.recoveries)
    asked = [(examples, run.config.demo) for examples in run.samples.values() if taught]
    asked += [(examples, "none") for examples in evaluation.splits.values()]
    for examples, demo in asked:
        prompts = [len(data.teacher_prompt(tokenizer, e, demo)) for e in examples]
        answers = [evaluation.eval_tokens or len(tokenizer.answer(e.response)) for e in examples]
        sizes = zip(map(max, prompts, answers), prompts, (e.where for e in examples))
        total = max(prompts) + evaluate.answer_tokens(evaluation, examples)
        found.append((total, max(sizes)[-1]))
        for e in examples:
            for context, text in e.choices:
                ids = data.begun(tokenizer, tokenizer.encode(context)) + tokenizer.encode(text)
                found.append((len(ids), e.where))
    return found


def where_of(ids, tokenizer, examples):
    """The file and line of the example whose prompt these ids are, or prompt and answer; else
    ""."""
    for e in (e for e in examples if e.where):
        prompt = data.student_prompt(tokenizer, e)
        if ids in (prompt, prompt + tokenizer.answer(e.response)):
            return e.where
    return ""


def hashes(c, paths, examples, texts):
    """Of the model's weights, and of all that a run reads: the weights of each of its models, its
    rows, its texts."""
    models = {name: checkpoint.weights_sha256(path) for name, path in paths.items()}
    rows = [(e.prompt, e.response, e.system, *e.earlier, *e.choices, e.answer) for e in examples]
    everything = repr((models, rows, texts)).encode()
    return {"model_sha256": models[c.model][:12],
            "inputs_sha256": hashlib.sha256(everything).hexdigest()[:12]}


def facts(folder, student, tasks, evaluation, texts):
    """Hashes and counts of what a run reads."""
    def sha256(text):
        return hashlib.sha256(text.encode()).hexdigest()[:12]
    windows, splits = evaluation.windows["perplexity"], evaluation.splits
    trained = [[(e.prompt, e.response, *e.earlier) for e in task.train] for task in tasks]
    measured = [[(e.prompt, e.response, *e.earlier) for e in examples]
                for examples in splits.values()]
    return {"model": str(folder), "parameters": sum(p.numel() for p in student.parameters()),
            "damage": {}, "data_sha256": sha256(repr(trained)),
            "eval_sha256": sha256(repr(measured)),
            "eval_examples": {name: len(examples) for name, examples in splits.items()},
            "text_sha256": sha256(texts["perplexity"]), "text_tokens": sum(map(len, windows)),
            "text_window": len(windows[0]), "context_length": student.config.context_length}
