"""How long a step of self-distillation takes, where the time goes, and how that compares with TRL on the same job.

    python tests/bench.py                          # the job, split into its parts, against this machine's own ceilings
    python tests/bench.py --scale                  # the same at 2 and 4 times the batch, and the length
    pip install -r tests/bench-requirements.txt && python tests/bench.py --peer trl

The job: SmolLM2-135M-Instruct, 16 chat prompts of about 40 tokens, one on-policy rollout each of exactly 48 new tokens at
temperature 1, reverse KL over the whole vocabulary against a frozen copy of the model, AdamW on every parameter. Ours also
quantizes the student to int4 each step (`--degrade none` leaves that out); TRL's SDFTTrainer does not. Every measurement
is a process of its own, so that its peak memory is its own.
"""
import argparse
import copy
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def options(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="Hugging Face folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts a step [16]")
    parser.add_argument("--micro-batch", type=int, default=16, help="prompts that go through the models together [16]")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens of each rollout [48]")
    parser.add_argument("--steps", type=int, default=5, help="steps timed; the median is shown [5]")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those [3]")
    parser.add_argument("--degrade", default="int4", help="int2 … int8 or none: how our student is quantized [int4]")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="as train.py's [auto]")
    parser.add_argument("--moments", default="float32", choices=["float32", "bfloat16"], help="as train.py's [float32]")
    parser.add_argument("--checkpointing", action="store_true", help="as train.py's")
    parser.add_argument("--scale", action="store_true", help="also 2 and 4 times the batch, and the length")
    parser.add_argument("--peer", choices=["trl"], help="also time TRL's SDFTTrainer")
    parser.add_argument("--peer-dtype", default="float32,bfloat16", help="in which precisions [float32,bfloat16]")
    parser.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def prompts(n):
    """The first n questions about elements, as chats of about 40 tokens with the model's own default system message."""
    import data
    examples = data.load_task("science").train
    return [[{"role": "user", "content": e.prompt}] for e in (examples * (n // len(examples) + 1))[:n]]


# ------------------------------------------------------------------------------------------------------------- one child

def ours(o):
    """Seconds a step of sdft.recover, by part."""
    import torch

    import data
    import fetch
    import machine
    import quant
    import sdft
    from model import GPT, generate

    if o.dtype == "auto":
        o.dtype = "bfloat16" if machine.bfloat16_is_fast("cpu") else "float32"
    machine.keep_freed_memory()
    folder = o.model or fetch.default_model()
    tokenizer = data.load_tokenizer(folder)
    student = GPT.from_pretrained(folder)
    teacher = copy.deepcopy(student).eval().to(getattr(torch, o.dtype))
    if o.degrade != "none":
        quant.quantize_(student, o.degrade, 64)
    quant.compute_in_(student, getattr(torch, o.dtype))
    student.checkpointing = o.checkpointing
    ids = [tokenizer.chat(p) for p in prompts(o.batch_size)]
    batches = [[sdft.Prompt(i, i) for i in ids]] * (o.warmup + o.steps)
    spent = {"quantize": 0.0, "rollout": 0.0, "teacher": 0.0, "optimizer": 0.0}

    def timed(name, function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - began
            return result
        return run

    states = sdft.completion_states
    scored = timed("teacher", states)
    sdft.completion_states = lambda model, *rest, **more: (scored if model is teacher else states)(model, *rest, **more)
    teacher.head = timed("teacher", teacher.head)
    quant.FakeQuantize.forward = timed("quantize", quant.FakeQuantize.forward)
    for kind in (torch.optim.AdamW, sdft.CompactAdamW):
        kind.step = timed("optimizer", kind.step)
    rollout = timed("rollout", functools.partial(generate, max_new_tokens=o.new_tokens, batch_size=o.batch_size,
                                                 generator=torch.Generator().manual_seed(0)))
    steps = []

    def log(line):
        parts = dict(spent)
        steps.append(parts | {"student": line["seconds"] - sum(parts.values()), "total": line["seconds"]})
        spent.update(dict.fromkeys(spent, 0.0))

    sdft.recover(student, teacher, batches, rollout, loss=sdft.reverse_kl, micro_batch=o.micro_batch,
                 moments=getattr(torch, o.moments), log=log, progress="")
    seconds = {part: statistics.median(s[part] for s in steps[o.warmup:]) for part in steps[0]}
    blocks = sum(p.numel() for name, p in teacher.named_parameters() if "layers" in name)
    head, lengths = teacher.embed_tokens.weight.numel(), [len(i) for i in ids]
    new = o.new_tokens * o.batch_size
    passed = sum(lengths) + new - o.batch_size  # tokens of one pass over prompts and completions
    forward = 2 * (blocks * passed + head * new)
    flops = {"rollout": forward, "teacher": forward, "student": 3 * forward}
    read = teacher.embed_tokens.weight.element_size() * (blocks + head) * o.new_tokens  # bytes: the weights, once a token
    return {"seconds": seconds, "peak_gib": machine.peak_memory_gib(), "tokens_per_second": new / seconds["total"],
            "prompt_tokens": sum(lengths), "gflops": {part: f / seconds[part] / 1e9 for part, f in flops.items()} | {
                "total": sum(flops.values()) / seconds["total"] / 1e9},
            "rollout_gb_per_second": read / seconds["rollout"] / 1e9, "ceilings": ceilings(torch, o.dtype), "dtype": o.dtype}


def trl(o):
    """Seconds a step of TRL's SDFTTrainer: full logits, reverse KL, the initial model as teacher, one rollout a prompt."""
    import tempfile

    import datasets
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    import data
    import fetch
    import machine

    folder = str(o.model or fetch.default_model())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    rows = [{"prompt": p, "privileged_context": ""} for p in prompts(o.batch_size)] * (o.warmup + o.steps)
    seconds = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            now = time.perf_counter()
            seconds.append(now - last[0])
            last[0] = now

    with tempfile.TemporaryDirectory() as out:
        args = SDFTConfig(out, per_device_train_batch_size=o.batch_size, gradient_accumulation_steps=1, num_generations=1,
                          max_steps=o.warmup + o.steps, max_completion_length=o.new_tokens,
                          generation_kwargs={"min_new_tokens": o.new_tokens}, distillation_mode="full_logits",
                          distillation_alpha=1.0, teacher_model_kind="base", learning_rate=1e-4, shuffle_dataset=False,
                          bf16=o.dtype == "bfloat16", use_cpu=True, gradient_checkpointing=False,
                          save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no")
        trainer = SDFTTrainer(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), args,
                              datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()])
        last = [time.perf_counter()]
        trainer.train()
    lengths = [len(data.load_tokenizer(folder).chat(p)) for p in prompts(o.batch_size)]
    total = statistics.median(seconds[o.warmup:])
    return {"seconds": {"total": total}, "peak_gib": machine.peak_memory_gib(),
            "tokens_per_second": o.batch_size * o.new_tokens / total, "prompt_tokens": sum(lengths)}


def ceilings(torch, dtype):
    """The best this machine does: a product of 2048 x 2048 matrices (GFLOP/s) and a copy of 512 MB (GB/s, both ways)."""
    a, b, c, d = *torch.randn(2, 2048, 2048).to(getattr(torch, dtype)), *torch.ones(2, 2 ** 27)
    best = {"gflops": 0.0, "gb_per_second": 0.0}
    for _ in range(5):
        t0 = time.perf_counter()
        a @ b
        t1 = time.perf_counter()
        d.copy_(c)
        t2 = time.perf_counter()
        best = {"gflops": max(best["gflops"], 2 * 2048 ** 3 / (t1 - t0) / 1e9),
                "gb_per_second": max(best["gb_per_second"], 2 * 4 * 2 ** 27 / (t2 - t1) / 1e9)}
    return best


# ---------------------------------------------------------------------------------------------------------- the parent

def measure(o, kind, **changes):
    """Run one child with these options changed; its results."""
    settings = {**vars(o), "child": kind, **changes}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()
             if name not in ("scale", "peer", "peer_dtype", "checkpointing") and value != ""]
    flags += ["--checkpointing"] * o.checkpointing
    done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})
    if done.returncode:
        sys.exit(f"error: the {kind} benchmark failed (exit code {done.returncode}); see above")
    return json.loads(done.stdout.splitlines()[-1])


def show(name, r, base=None):
    parts = " ".join(f"{part} {s:.2f}" for part, s in r["seconds"].items() if part != "total")
    ratio = f"  ours: {base['seconds']['total'] / r['seconds']['total']:.2f} of the time, " \
            f"{base['peak_gib'] / r['peak_gib']:.2f} of the memory" if base else ""
    print(f"{name:24}{r['seconds']['total']:8.2f} s/step {r['tokens_per_second']:8.1f} tokens/s {r['peak_gib']:6.2f} GiB  "
          f"{parts}{ratio}", flush=True)


def main():
    o = options()
    if o.child:
        print(json.dumps({"ours": ours, "trl": trl}[o.child](o)))
        return
    base = measure(o, "ours")
    print(f"{o.batch_size} prompts, {base['prompt_tokens']} tokens in all; {o.new_tokens} new tokens each; "
          f"median of {o.steps} steps; {platform.machine()}, {os.cpu_count()} cores")
    show(f"ours {base['dtype']}", base)
    top = base["ceilings"]
    print("  of this machine's {:.0f} GFLOP/s: ".format(top["gflops"])
          + ", ".join(f"{part} {g / top['gflops']:.0%}" for part, g in base["gflops"].items())
          + f"; of its {top['gb_per_second']:.1f} GB/s (copy): rollout, weights alone, "
          f"{base['rollout_gb_per_second'] / top['gb_per_second']:.0%}", flush=True)
    if o.scale:
        for k in (2, 4):
            show(f"ours, {k} x batch", measure(o, "ours", batch_size=k * o.batch_size))
            show(f"ours, {k} x length", measure(o, "ours", new_tokens=k * o.new_tokens))
    if o.peer:
        for dtype in o.peer_dtype.split(","):
            show(f"{o.peer} {dtype}", measure(o, o.peer, dtype=dtype), base)


if __name__ == "__main__":
    main()
