"""Damage a language model, watch it get worse, let its healthy checkpoint teach it back, and show all three stages.

    python train.py --degrade int4                  # SmolLM2-135M-Instruct, fetched once
    python train.py --degrade ffn10,nf4 --model DIR # any GPT-2, Llama or Qwen2/2.5 folder

The story, top to bottom: `prepare` reads everything and finds a user's mistakes; `execute` measures the healthy model and the
damaged one, recovers it with SDFT (§3) and measures again; `save`, `report` and `draw` write what came of it to --out.

Where this departs from the paper, or fills in what it leaves open, is listed in README.
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

import cka
import data
import fetch
import lora
import parallel
import prune
import quant
import sdft
from model import GPT, generate


def option(default, help, **extra):
    """A Config field: its default, the line --help shows, and further arguments for argparse."""
    return dataclasses.field(default=default, metadata={"help": help, **extra})


@dataclass
class Config:
    """The whole configuration of a run; every field is a command-line option of the same name."""

    model: str = option("", "Hugging Face folder of the healthy model (default: SmolLM2-135M-Instruct, fetched once)")
    degrade: str = option("int4", "the damage, by commas: ffn10 (percent of the neurons removed), magnitude30, wanda30 (percent "
                          "of the weights held at zero), magnitude2:4, wanda2:4, int2 … int8, nf4")
    importance: str = option("activation", "what ffn removes least of", choices=["activation", "weight"])
    calibration: int = option(64, "training examples that activations are taken from, for ffn and wanda")
    double_quant: bool = option(False, "nf4: quantize the scales too")
    group_size: int = option(64, "inputs that share a quantization scale; 0: one scale per output channel")
    symmetric: bool = option(True, "symmetric grid around 0, or an integer zero point")
    data: str = option("science,text", "prompts to recover on: science, tooluse, text, or files (.jsonl, text), by commas")
    eval: str = option("", "further tasks or .jsonl files to measure only, by commas")
    text: str = option("", "UTF-8 file to measure perplexity on (default: held-out part of Python's own documentation)")
    recover: str = option("sdft", "sdft; or a baseline: kd (the teacher scores the expert's answers, not the student's), sft "
                          "(the expert's answers alone), none", choices=["sdft", "kd", "sft", "none"])
    demo: bool = option(True, "show the teacher the expert demonstration")
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


def parse(argv=None):
    """The command line as a Config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        extra = dict(f.metadata) | {"help": f"{f.metadata['help']} [{f.default}]".replace(" []", "")}
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind, **extra)
    return Config(**vars(parser.parse_args(argv)))


@dataclass
class Run:
    """What `prepare` made of a Config: everything that a mistake of the user's could have broken."""

    config: Config
    folder: Path
    tokenizer: data.Tokenizer
    teacher: GPT
    student: GPT
    batches: list       # of lists of sdft.Prompt
    splits: dict        # metric name -> list of Example
    windows: list       # of lists of ids, for perplexity
    facts: dict         # hashes and counts that results.json reports


COUNTS = "steps", "batch_size", "micro_batch", "max_new_tokens", "text_tokens", "cka_samples", "lora_rank", "calibration"
NOT_NEGATIVE = "group_size", "answer_tokens", "eval_limit", "warmup", "weight_decay", "temperature"


def prepare(c):
    """Read and check everything; ValueError or OSError, in one line, for a user's mistake."""
    for names, least in ((COUNTS, 1), (NOT_NEGATIVE, 0)):
        for name in names:
            if getattr(c, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(c, name)}")
    for name, most in (("lr", math.inf), ("clip", math.inf), ("top_p", 1)):
        if not 0 < getattr(c, name) <= most:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0{' and at most 1' if most == 1 else ''}, "
                             f"not {getattr(c, name)}")
    prune.parse_damage(c.degrade)
    kind, _, number = c.device.partition(":")
    if c.device != "cpu" and (kind != "cuda" or not (number or "0").isdecimal() or int(number or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {c.device}: this torch sees {torch.cuda.device_count()} CUDA devices; try --device cpu")
    if c.dtype == "auto":
        c.dtype = "bfloat16" if bfloat16_is_fast(c.device) else "float32"
    if c.train == "lora" and c.train_embeddings:
        raise ValueError("--train lora trains low-rank updates alone: leave out --train-embeddings")
    if c.shard and parallel.size() == 1:
        raise ValueError("--shard cuts the student into shares for several processes; start with torchrun --nproc_per_node N")
    if c.batch_size % parallel.size():
        raise ValueError(f"--batch-size {c.batch_size} cannot be shared evenly by {parallel.size()} processes")
    tasks = [data.load_task(name) for name in c.data.split(",")]
    measured = {t.name: t for t in [*tasks, *(data.load_task(name) for name in c.eval.split(",") if name)]}
    text = data.read_text(c.text) if c.text else data.split_text()[1]

    with parallel.first():
        folder = Path(c.model) if c.model else fetch.default_model()
    tokenizer = data.load_tokenizer(folder)
    teacher, student, damage = models(c, folder, lambda: calibration_sequences(c, tokenizer, tasks))

    splits = {f"{t.name}_{name}": es[:c.eval_limit or None] for t in measured.values() for name, es in t.eval.items()}
    windows = data.text_windows(tokenizer, text, length=min(256, teacher.config.context_length))
    batches = [[sdft.Prompt(data.student_prompt(tokenizer, e, c.text_tokens),
                            data.teacher_prompt(tokenizer, e, c.demo, c.text_tokens),
                            data.expert_answer(tokenizer, e, c.text_tokens, c.max_new_tokens)) for e in batch]
               for batch in data.batches(tasks, c.steps, c.batch_size, c.seed)]
    if c.recover in ("kd", "sft") and not all(p.answer for batch in batches for p in batch):
        raise ValueError(f"--recover {c.recover}: some text ends within --text-tokens {c.text_tokens}; give fewer")
    longest = [len(p.teacher) + c.max_new_tokens for batch in batches for p in batch]
    for es in splits.values():
        longest.append(max(len(data.student_prompt(tokenizer, e)) for e in es) + answer_tokens(c, tokenizer, es))
    if max(longest) > teacher.config.context_length:
        raise ValueError(f"a prompt with its answer takes {max(longest)} tokens, "
                         f"more than the model's context of {teacher.config.context_length}")
    facts = {"model": str(folder), "parameters": sum(p.numel() for p in teacher.parameters()), "damage": damage,
             "data_sha256": sha256(repr([[(e.prompt, e.response) for e in t.train] for t in tasks])),
             "eval_sha256": sha256(repr([[(e.prompt, e.response) for e in es] for es in splits.values()])),
             "eval_examples": {name: len(es) for name, es in splits.items()},
             "text_sha256": sha256(text), "text_tokens": sum(map(len, windows)), "text_window": len(windows[0]),
             "context_length": teacher.config.context_length}
    if parallel.rank() == 0:
        prepare_out(Path(c.out))
    return Run(c, folder, tokenizer, teacher, student, batches, splits, windows, facts)


def calibration_sequences(c, tokenizer, tasks):
    """Ids of training examples, with their answers, that activations are taken from; text is read to 128 tokens."""
    examples = data.batches(tasks, 1, c.calibration, c.seed)[0]
    return [data.student_prompt(tokenizer, e, 128) + (tokenizer.answer(e.response) if e.chat else []) for e in examples]


def models(c, folder, sequences):
    """The teacher; the student, damaged and ready to be trained; and what was done to it."""
    dtype = getattr(torch, c.dtype)
    student = GPT.from_pretrained(folder, dtype if c.train == "lora" else torch.float32, c.device)
    teacher = copy.deepcopy(student).to(dtype).eval().requires_grad_(False)
    damage = prune.damage_(student, c.degrade, sequences, c.importance, c.group_size or None, c.symmetric, c.double_quant)
    for name, p in student.named_parameters():
        p.requires_grad_(c.train_embeddings or not name.startswith(("embed_", "lm_head")))
    if c.train == "lora":
        lora.add_lora_(student, c.lora_rank, c.lora_alpha, torch.Generator().manual_seed(c.seed))
    quant.compute_in_(student, dtype)
    healthy = dict(teacher.named_parameters())
    for name, p in student.named_parameters():  # what is not trained need not be there twice
        same = healthy.get(name.replace("parametrizations.", "").removesuffix(".original"))
        if not p.requires_grad and same is not None and (same.dtype, same.shape) == (p.dtype, p.shape):
            p.data = same.data
    student.checkpointing = c.checkpointing
    if c.shard:
        parallel.shard_(student)
    return teacher, student, damage


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


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

@dataclass
class Measurement:
    """One model's performance, item by item, three of its answers, and its likeness to the healthy model."""

    items: dict     # metric name -> [n]: 0/1 per example, or nats per token of a text window
    answers: list   # (prompt, answer) of examples of the first split
    cka: dict       # level -> kind -> [n_layer], against the healthy model (empty for itself)

    def value(self, metric):
        """Perplexity, or accuracy in percent."""
        mean = self.items[metric].mean().item()
        return math.exp(mean) if metric == "perplexity" else 100 * mean


@torch.no_grad()
def measure(run, model, healthy_states=None):
    """Accuracy on every split, perplexity on the text windows; and CKA with the healthy model, given its hidden states."""
    items, answers = {}, []
    with parametrize.cached():
        for name, examples in run.splits.items():
            mine = parallel.share(examples)
            if examples[0].choices:
                items[name] = parallel.gather([float(best_choice(model, run.tokenizer, e) == e.answer) for e in mine])
                continue
            texts = parallel.gather(answer(model, run.tokenizer, mine, answer_tokens(run.config, run.tokenizer, examples)))
            items[name] = [float(e.check(t)) for e, t in zip(examples, texts)]
            answers = answers or [(e.prompt, t) for e, t in zip(examples, texts)]
        mine = parallel.share(run.windows)
        items["perplexity"] = parallel.gather([x for i in range(0, len(mine), 4) for x in nats(model, mine[i:i + 4])])
        likeness = compare(cka.hidden_states(model, cka_sequences(run)), healthy_states) if healthy_states is not None else {}
    items = {metric: torch.tensor(values) for metric, values in items.items()}
    return Measurement(items, answers[:: max(1, len(answers) // 3)][:3], likeness)


def compare(states, healthy):
    """CKA of two models' hidden states -> {level: {kind: [n_layer]}}: over each sequence's tokens, and over their last ones."""
    pairs = list(zip(states, healthy))
    tokens = parallel.gather([list(cka.token_level([x], [y]).values()) for x, y in pairs if x.size(1) >= 4])
    last = parallel.gather([(x[:, -1:], y[:, -1:]) for x, y in pairs])
    return {"tokens": dict(zip(cka.KINDS, torch.tensor(tokens).mean(0).tolist())), "samples": cka.sample_level(*zip(*last))}


def answer_tokens(c, tokenizer, examples):
    """How many tokens an answer to these examples may take."""
    return c.answer_tokens or max(len(tokenizer.answer(e.response)) for e in examples)


def answer(model, tokenizer, examples, max_new_tokens):
    """Greedy answers, as text."""
    prompts = [data.student_prompt(tokenizer, e) for e in examples]
    return [tokenizer.decode(ids).strip() for ids in
            generate(model, prompts, max_new_tokens, temperature=0, eos_id=tokenizer.eos_id, batch_size=128)]


def best_choice(model, tokenizer, example):
    """Index of the likeliest (context, continuation) pair; different continuations are compared per character."""
    contexts, continuations = zip(*example.choices)
    targets = [tokenizer.encode(t) for t in continuations]
    states = sdft.completion_states(model, [tokenizer.encode(t) for t in contexts], targets)
    logp = F.log_softmax(model.head(states).float(), -1)
    logp = logp[torch.arange(len(logp)), [i for t in targets for i in t]].split([len(t) for t in targets])
    scores = [p.sum().item() / len(text) for p, text in zip(logp, continuations)]
    return scores.index(max(scores))


def nats(model, windows):
    """Mean negative log-likelihood of each window's tokens after the first, a list."""
    ids = torch.tensor(windows, device=model.device)
    states = model.backbone(ids[:, :-1])  # the logits of one window at a time: [T, V]
    return [F.cross_entropy(model.head(x).float(), row[1:]).item() for x, row in zip(states, ids)]


def cka_sequences(run):
    """This process's share of prompt + ground truth (§4.2) of the first task's eval examples; text windows if those are < 4."""
    examples = [e for e in next(iter(run.splits.values()), []) if e.chat and e.response]
    examples = examples[:: max(1, len(examples) // run.config.cka_samples)][:run.config.cka_samples]
    sequences = [data.student_prompt(run.tokenizer, e) + run.tokenizer.answer(e.response) for e in examples]
    return parallel.share(sequences if len(sequences) >= 4 else run.windows)


def recovered_fraction(healthy, degraded, recovered, metric):
    """(recovered - degraded) / (healthy - degraded); None where the damage is within two paired standard errors of nothing."""
    difference = healthy.items[metric] - degraded.items[metric]
    noise = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    if abs(difference.mean().item()) <= 2 * noise:
        return None
    h, d, r = (m.value(metric) for m in (healthy, degraded, recovered))
    return (r - d) / (h - d)


# ---------------------------------------------------------------------------------------------------------------------
# The job

def execute(run):
    """Measure, recover, measure; returns results.json's content and the three Measurements."""
    c, seconds, stages = run.config, {}, {}
    dtype, writer = getattr(torch, c.dtype), parallel.rank() == 0
    with timed(seconds, "healthy"):
        states = cka.hidden_states(run.teacher, cka_sequences(run))
        stages["healthy"] = measure(run, run.teacher)
    with timed(seconds, "degraded"):
        stages["degraded"] = measure(run, parallel.whole(run.student, dtype), states)
    generator = torch.Generator().manual_seed(c.seed)

    def rollout(student, prompts):
        return parallel.gather(generate(
            parallel.whole(student, dtype), prompts, c.max_new_tokens, c.temperature, c.top_p, run.tokenizer.eos_id, generator,
            batch_size=c.batch_size, rows=parallel.share(range(len(prompts)))))

    with timed(seconds, "recover"), open(Path(c.out) / "metrics.jsonl" if writer else os.devnull, "w", encoding="utf-8") as log:
        settings = dict(micro_batch=c.micro_batch, lr=c.lr, warmup=c.warmup, weight_decay=c.weight_decay, clip=c.clip,
                        moments=getattr(torch, c.moments), progress=writer,
                        log=lambda line: print(json.dumps(line), file=log, flush=True))
        if c.recover == "sft":
            sdft.sft(run.student, run.batches, **settings)
        elif c.recover != "none":
            sdft.recover(run.student, run.teacher, run.batches, rollout if c.recover == "sdft" else None,
                         loss=sdft.LOSSES[c.loss], **settings)
    run.student = parallel.whole(run.student) if c.shard else quant.bake_(run.student)
    quant.compute_in_(run.student, dtype)
    with timed(seconds, "recovered"):
        stages["recovered"] = measure(run, run.student, states)
    healthy, degraded, recovered = stages.values()
    likeness = {level: {stage: stages[stage].cka[level] for stage in ("degraded", "recovered")} for level in cka.LEVELS}
    results = {"config": dataclasses.asdict(c), "environment": environment(run),
               "stages": {name: {metric: m.value(metric) for metric in m.items} for name, m in stages.items()},
               "recovered_fraction": {m: recovered_fraction(healthy, degraded, recovered, m) for m in healthy.items},
               "cka": likeness, "seconds": seconds}
    return results, stages


@contextlib.contextmanager
def timed(seconds, name):
    """seconds[name] = how long the body took."""
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def environment(run):
    """Everything a number depends on and a reader cannot see."""
    on_gpu = run.config.device != "cpu"
    gpu_memory = {"peak_gpu_memory_gib": torch.cuda.max_memory_allocated(run.config.device) / 2 ** 30} if on_gpu else {}
    return {**run.facts, "python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
            "processor": torch.cuda.get_device_name(run.config.device) if on_gpu else cpu_name(),
            "threads": torch.get_num_threads(), "processes": parallel.size(),
            "date": datetime.datetime.now().isoformat(timespec="minutes"),
            "peak_memory_gib": peak_memory_gib(), **gpu_memory}


def peak_memory_gib():
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def bfloat16_is_fast(device):
    """Whether the processor has instructions that multiply matrices of bfloat16."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cpu_name():
    """The processor's name where Linux tells, with the vector instructions that decide its speed."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def save(run, results):
    """DIR/student (a folder that this project and transformers load) and DIR/results.json."""
    out = Path(run.config.out)
    run.student.save_pretrained(out / "student")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                 "generation_config.json", "chat_template.jinja"):
        if (run.folder / name).exists():
            shutil.copy(run.folder / name, out / "student" / name)
    (out / "results.json.part").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(out / "results.json.part", out / "results.json")


# ---------------------------------------------------------------------------------------------------------------------
# Showing

def report(results, stages):
    """The run as text: metrics, sample answers, CKA by layer."""
    lines, values, fraction = [""], results["stages"], results["recovered_fraction"]
    lines.append(f"{'':24}{'healthy':>10}{'degraded':>10}{'recovered':>10}{'recovered fraction':>20}")
    for metric, f in fraction.items():
        name = metric if metric == "perplexity" else metric + " %"
        row = "".join(f"{values[stage][metric]:10.2f}" for stage in values)
        lines.append(f"{name:24}{row}{'within noise' if f is None else f'{f:.2f}':>20}")
    for i, (prompt, _) in enumerate(stages["healthy"].answers):
        lines += ["", f"> {prompt}"] + [f"  {name:10} {' '.join(m.answers[i][1].split())}" for name, m in stages.items()]
    for level, by_stage in results["cka"].items():
        lines += ["", f"CKA with the healthy model over {level}, by layer"]
        for kind in ("linear", "linear_debiased"):
            least = min(min(by_stage[stage][kind]) for stage in by_stage)
            for stage in by_stage:
                v = by_stage[stage][kind]
                lines.append(f"  {kind:16}{stage:10} {chart(v, least)}  last {v[-1]:.4f}  mean {sum(v) / len(v):.4f}")
    e, s = results["environment"], results["seconds"]
    damage = ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in e["damage"].items())
    lines += ["", f"damage {results['config']['degrade']}: {damage}",
              f"perplexity of {e['text_tokens']} tokens in windows of {e['text_window']} (text {e['text_sha256']}); "
              f"train data {e['data_sha256']}; eval data {e['eval_sha256']} {e['eval_examples']}",
              f"seed {results['config']['seed']}; {sum(s.values()) / 60:.1f} minutes "
              f"({', '.join(f'{name} {value:.0f} s' for name, value in s.items())}), "
              f"peak memory {e.get('peak_gpu_memory_gib', e['peak_memory_gib']):.1f} GiB, "
              f"{results['config']['dtype']}, {e['processor']}, {e['processes']} x {e['threads']} threads"]
    return "\n".join(lines)


def chart(values, least):
    """One character a layer, from ▁ at `least` to █ at 1."""
    return "".join("▁▂▃▄▅▆▇█"[min(7, max(0, int(8 * (v - least) / max(1e-9, 1 - least))))] for v in values)


def draw(results, steps, path):
    """report.png: the recovery curve and CKA by layer. Nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    shown = "kl" if steps and "kl" in steps[0] else "loss"
    left.plot([s["step"] + 1 for s in steps], [s[shown] for s in steps])
    left.set(title=f"Recovery from {results['config']['degrade']}", xlabel="step", ylabel=f"{shown}, nats per token", ylim=0)
    for level, style in (("tokens", ":"), ("samples", "-")):
        for stage, color in (("degraded", "tab:red"), ("recovered", "tab:green")):
            values = results["cka"][level][stage]["linear_debiased"]
            right.plot(range(1, len(values) + 1), values, style, color=color, label=f"{stage}, {level}")
    right.set(title="CKA with the healthy model (linear, debiased)", xlabel="layer")
    right.legend()
    figure.savefig(path, dpi=120)


def main(argv=None):
    """The command line; returns the exit code, 2 for a user's mistake."""
    config = parse(argv)
    config.device = parallel.start(config.device)
    try:
        with parallel.together():
            try:
                run = prepare(config)
            except ValueError as error:
                return complain(error, 2)
            results, stages = execute(run)
            if parallel.rank() == 0:
                save(run, results)
    except OSError as error:
        return complain(error, 2)
    except parallel.PeerLost:
        return complain(f"another process of this run has died; {config.out}/results.json and student/ were not written", 1)
    if parallel.rank() == 0:
        print(report(results, stages))
        steps = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
        draw(results, steps, Path(config.out) / "report.png")
        print(f"wrote {config.out}/results.json, metrics.jsonl, student/")
    parallel.stop()
    return 0


def complain(error, code):
    """One line, from one process; returns the exit code."""
    if parallel.first_to_speak():
        print(f"\nerror: {error}" if code == 1 else f"error: {error}", file=sys.stderr)  # 1: a progress bar was left standing
    return code


if __name__ == "__main__":
    sys.exit(main())
