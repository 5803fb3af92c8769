"""How long a step of self-distillation takes, where the time goes, and how TRL does the same job.

    python bench.py            # the job, split into its parts, against this machine's own ceilings
    python bench.py --plain    # the same without fast.py
    python bench.py --parts    # also without each part of fast.py, and without all
    python bench.py --scale    # the same at 2 and 4 times the batch, and the length
    pip install -r tests/bench-requirements.txt && python bench.py --peer trl

The job: SmolLM2-135M-Instruct, 16 chat prompts of about 40 tokens, one on-policy rollout each of
exactly 48 new tokens at temperature 1, reverse KL over the whole vocabulary against a frozen copy
of the model, AdamW on every parameter. Ours also quantizes the student to int4 each step
(`--degrade none` leaves that out); TRL's SDFTTrainer does not. Every measurement is a process of
its own, so that its peak memory is its own.
"""
import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

PARTS = "score", "backward", "generate", "memory"  # of fast.py


def options(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="", help="Hugging Face folder (default: SmolLM2-135M-Instruct)")
    add("--batch-size", type=int, default=16, help="prompts a step [16]")
    add("--micro-batch", type=int, default=16, help="prompts that pass together [16]")
    add("--new-tokens", type=int, default=48, help="tokens of each rollout [48]")
    add("--steps", type=int, default=5, help="steps timed; the median is shown [5]")
    add("--warmup", type=int, default=3, help="steps before those [3]")
    add("--degrade", default="int4", help="int4, nf4 … or none: our student's grid [int4]")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="[cpu]")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="as train.py's [auto]")
    add("--adam-dtype", default="float32", choices=["float32", "bfloat16"],
        help="as train.py's [float32]")
    add("--gradient-checkpointing", action="store_true", help="as train.py's")
    add("--plain", action="store_true", help="as train.py's: without fast.py")
    add("--without", default="", help=f"parts of it to do without, by commas: {', '.join(PARTS)}")
    add("--parts", action="store_true", help="also without each of them, and without all")
    add("--scale", action="store_true", help="also 2 and 4 times the batch, and the length")
    add("--peer", choices=["trl"], help="also time TRL's SDFTTrainer")
    add("--peer-dtype", default="float32,bfloat16", help="in which precisions [float32,bfloat16]")
    add("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    o = parser.parse_args(argv)
    if o.device != "cpu":
        import torch
        if not torch.cuda.is_available():
            parser.error(f"--device {o.device}: this torch sees no CUDA device")
    o.without = ",".join(PARTS) if o.plain else o.without
    return o


def prompts(n):
    """The first n questions about elements, as chats of about 40 tokens with the model's own
    default system message."""
    import data
    examples = data.load_task("science").train
    examples = (examples * (n // len(examples) + 1))[:n]
    return [[{"role": "user", "content": e.prompt}] for e in examples]


# --------------------------------------------------------------------------------- One measurement

def ours(o):
    """Seconds a step of sdft.recover, by part, and what they are of this machine's ceilings."""
    import torch

    import checkpoint
    import data
    import parallel

    if "memory" not in o.without:
        import fast
        fast.keep_freed_memory()
    if o.dtype == "auto":
        o.dtype = "bfloat16" if parallel.bfloat16_is_fast(o.device) else "float32"
    folder = checkpoint.resolve(o.model) if o.model else checkpoint.default_model()
    tokenizer = data.load_tokenizer(folder)
    ids = [tokenizer.chat(p) for p in prompts(o.batch_size)]
    student, teacher = models(o, folder)
    steps = recover(o, student, teacher, ids)[o.warmup:]
    seconds = {part: statistics.median(s[part] for s in steps) for part in steps[0]}
    rates = against_ceilings(o, teacher, ids, seconds)
    peak = parallel.peak_memory_gib(o.device)  # before the ceilings
    return {"seconds": seconds, "peak_gib": peak, "dtype": o.dtype,
            "tokens_per_second": o.new_tokens * o.batch_size / seconds["total"],
            "prompt_tokens": sum(map(len, ids)), **rates,
            "ceilings": ceilings(torch, o.device, o.dtype),
            "processor": parallel.processor(o.device)}


def models(o, folder):
    """The student, on its grid, and its teacher, a frozen copy, as train.py makes them."""
    import torch

    import quant
    from model import GPT
    dtype = getattr(torch, o.dtype)
    student = GPT.from_pretrained(folder, device=o.device)
    teacher = copy.deepcopy(student).eval().to(dtype)
    if o.degrade != "none":
        quant.quantize_(student, o.degrade, 64)
    quant.compute_in_(student, dtype)
    student.gradient_checkpointing = o.gradient_checkpointing
    return student, teacher


def recover(o, student, teacher, ids):
    """Run sdft.recover; a dictionary a step: seconds of each part and in total."""
    import torch

    import sdft
    spent = dict.fromkeys(("quantize", "rollout", "teacher", "optimizer"), 0.0)
    rollout, score, backward = timed_parts(o, teacher, spent)
    steps = []

    def log(line):
        """Close a step: what no clock has seen is the student's passes."""
        rest = line["seconds"] - sum(spent.values())
        steps.append({**spent, "student": rest, "total": line["seconds"]})
        spent.update(dict.fromkeys(spent, 0.0))

    batches = [[sdft.Prompt(i, i) for i in ids]] * (o.warmup + o.steps)
    sdft.recover(student, teacher, batches, rollout, loss=sdft.reverse_kl,
                 micro_batch=o.micro_batch, score=score, backward=backward,
                 adam_dtype=getattr(torch, o.adam_dtype), log=log, progress="")
    return steps


def timed_parts(o, teacher, spent):
    """rollout, score and backward for sdft.recover; they, the teacher's head, the quantizer and the
    optimizer add their seconds to `spent`."""
    import torch

    import model
    import quant
    import sdft
    used = {"score": sdft.score, "backward": sdft.backward, "generate": model.generate}
    for name in {*used} - {*o.without.split(",")}:
        import fast
        used[name] = getattr(fast, name)
    score, backward = used["score"], used["backward"]
    rollout = functools.partial(
        used["generate"], max_new_tokens=o.new_tokens, batch_size=o.batch_size,
        generator=torch.Generator().manual_seed(0))
    clock = functools.partial(timed, spent, device=o.device)
    teachers = clock("teacher", score)

    def score_of_either(model, *arguments, **named):
        """The teacher's pass is timed; the student's belongs to the rest."""
        return (teachers if model is teacher else score)(model, *arguments, **named)

    teacher.head = clock("teacher", teacher.head)
    quant.FakeQuantize.forward = clock("quantize", quant.FakeQuantize.forward)
    for kind in (torch.optim.AdamW, sdft.CompactAdamW):
        kind.step = clock("optimizer", kind.step)
    return clock("rollout", rollout), score_of_either, backward


def timed(spent, name, function, device):
    """The same function; spent[name] grows by the seconds of each call."""
    @functools.wraps(function)
    def run(*args, **kwargs):
        began = now(device)
        result = function(*args, **kwargs)
        spent[name] += now(device) - began
        return result
    return run


def now(device):
    """Seconds, after what a GPU was asked to do is done."""
    if device != "cpu":
        import torch
        torch.cuda.synchronize(device)
    return time.perf_counter()


def against_ceilings(o, teacher, ids, seconds):
    """GFLOP/s of each part, and GB/s of the rollout, counted from the weights alone."""
    blocks = sum(p.numel() for name, p in teacher.named_parameters() if "layers" in name)
    head, new = teacher.embed_tokens.weight.numel(), o.new_tokens * o.batch_size
    passed = sum(map(len, ids)) + new - o.batch_size  # of one pass over prompts and completions
    forward = 2 * (blocks * passed + head * new)
    flops = {"rollout": forward, "teacher": forward, "student": 3 * forward}
    gflops = {part: f / seconds[part] / 1e9 for part, f in flops.items()}
    gflops["total"] = sum(flops.values()) / seconds["total"] / 1e9
    size = teacher.embed_tokens.weight.element_size()
    read = size * (blocks + head) * o.new_tokens  # bytes: the weights, once a token
    return {"gflops": gflops, "rollout_gb_per_second": read / seconds["rollout"] / 1e9}


def ceilings(torch, device, dtype):
    """The best this machine does: a product of 2048 x 2048 matrices, on a GPU of 8192 x 8192
    (GFLOP/s), and a copy of 512 MB (GB/s, both ways)."""
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, dtype))
    c, d = torch.ones(2, 2 ** 27, device=device)
    best = {"gflops": 0.0, "gb_per_second": 0.0}
    for _ in range(5):
        t0 = now(device)
        a @ b
        t1 = now(device)
        d.copy_(c)
        t2 = now(device)
        best["gflops"] = max(best["gflops"], 2 * n ** 3 / (t1 - t0) / 1e9)
        best["gb_per_second"] = max(best["gb_per_second"], 2 * 4 * 2 ** 27 / (t2 - t1) / 1e9)
    return best


def trl(o):
    """Seconds a step of TRL's SDFTTrainer: full logits, reverse KL, the initial model as teacher,
    one rollout a prompt."""
    import checkpoint
    import data
    import parallel
    folder = str(o.model or checkpoint.default_model())
    with tempfile.TemporaryDirectory() as out:
        seconds = trl_steps(o, folder, out)
    lengths = [len(data.load_tokenizer(folder).chat(p)) for p in prompts(o.batch_size)]
    total = statistics.median(seconds[o.warmup:])
    return {"seconds": {"total": total}, "peak_gib": parallel.peak_memory_gib(o.device),
            "tokens_per_second": o.batch_size * o.new_tokens / total,
            "prompt_tokens": sum(lengths)}


def trl_steps(o, folder, out):
    """Train with TRL; the seconds of each step."""
    import datasets
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    steps, seconds = o.warmup + o.steps, []
    rows = [{"prompt": p, "privileged_context": ""} for p in prompts(o.batch_size)] * steps

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ended = now(o.device)
            seconds.append(ended - last[0])
            last[0] = ended

    args = SDFTConfig(
        out, per_device_train_batch_size=o.batch_size, gradient_accumulation_steps=1,
        num_generations=1, max_steps=steps, max_completion_length=o.new_tokens,
        generation_kwargs={"min_new_tokens": o.new_tokens}, distillation_mode="full_logits",
        distillation_alpha=1.0, teacher_model_kind="base", learning_rate=1e-4,
        shuffle_dataset=False, bf16=o.dtype == "bfloat16", use_cpu=o.device == "cpu",
        gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True,
        logging_strategy="no")
    trainer = SDFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), args,
        datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()])
    last = [now(o.device)]
    trainer.train()
    return seconds


# --------------------------------------------------------------------------- All the measurements

def measure(o, kind, **changes):
    """Run one child with these options changed; its results."""
    settings = {**vars(o), "child": kind, **changes}
    for name in ("scale", "parts", "peer", "peer_dtype"):
        del settings[name]
    flags = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value is not False and value != "":
            flags.append(f"{flag}={value}")
    done = subprocess.run(
        [sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})
    if done.returncode:
        sys.exit(f"error: the {kind} benchmark failed (exit code {done.returncode}); see above")
    return json.loads(done.stdout.splitlines()[-1])


def show(name, r, base=None):
    """Print one measurement; with base, what ours takes of its time and memory."""
    seconds = r["seconds"]
    parts = " ".join(f"{part} {s:.2f}" for part, s in seconds.items() if part != "total")
    ratio = ""
    if base:
        ratio = (f"  ours: {base['seconds']['total'] / seconds['total']:.2f} of the time, "
                 f"{base['peak_gib'] / r['peak_gib']:.2f} of the memory")
    print(f"{name:24}{seconds['total']:8.2f} s/step {r['tokens_per_second']:8.1f} tokens/s "
          f"{r['peak_gib']:6.2f} GiB  {parts}{ratio}", flush=True)


def show_ceilings(r):
    """Print what one measurement reaches of this machine's ceilings."""
    top = r["ceilings"]
    parts = ", ".join(f"{part} {g / top['gflops']:.0%}" for part, g in r["gflops"].items())
    copied = r["rollout_gb_per_second"] / top["gb_per_second"]
    print(f"  of this machine's {top['gflops']:.0f} GFLOP/s: {parts}; "
          f"of its {top['gb_per_second']:.1f} GB/s (copy): rollout, weights alone, {copied:.0%}",
          flush=True)


def main(argv=None):
    """The command line; a child prints its results as JSON, the parent all of them as text."""
    o = options(argv)
    if o.child:
        print(json.dumps({"ours": ours, "trl": trl}[o.child](o)))
        return
    base = measure(o, "ours")
    print(f"{o.batch_size} prompts, {base['prompt_tokens']} tokens in all; "
          f"{o.new_tokens} new tokens each; median of {o.steps} steps; {base['processor']}, "
          f"{os.cpu_count()} cores")
    name = "ours, plain" if o.plain else "ours"
    show(f"{name} {base['dtype']}", base)
    show_ceilings(base)
    if o.parts:
        for part in PARTS:
            show(f"without {part}", measure(o, "ours", without=part), base)
        show("without all", measure(o, "ours", without=",".join(PARTS)), base)
    if o.scale:
        for k in (2, 4):
            show(f"{name}, {k} x batch", measure(o, "ours", batch_size=k * o.batch_size))
            show(f"{name}, {k} x length", measure(o, "ours", new_tokens=k * o.new_tokens))
    if o.peer:
        for dtype in o.peer_dtype.split(","):
            show(f"{o.peer} {dtype}", measure(o, o.peer, dtype=dtype), base)


if __name__ == "__main__":
    main()
