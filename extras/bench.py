"""How long a step of self-distillation takes, where the time goes, and how TRL does the same job.

    python extras/bench.py                # the job, by its parts, plain
    python extras/bench.py --with fast    # the same with extras/fast.py
    pip install -r tests/bench-requirements.txt && python extras/bench.py --peer trl

The job: SmolLM2-135M-Instruct, 16 chat prompts of about 40 tokens, one on-policy rollout each of
exactly 48 new tokens at temperature 1, reverse KL over the whole vocabulary against a frozen copy
of the model, AdamW on every weight of the blocks. Ours also quantizes the student to int4 each
step; TRL's SDFTTrainer does not. Each measurement is a process, so its peak memory is its own.
"""
import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def options(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="", help="Hugging Face folder [SmolLM2-135M-Instruct]")
    add("--batch-size", type=int, default=16, help="prompts a step [16]")
    add("--new-tokens", type=int, default=48, help="tokens of each rollout [48]")
    add("--steps", type=int, default=5, help="steps timed; the median is shown [5]")
    add("--warmup", type=int, default=3, help="steps before those [3]")
    add("--degrade", default="int4", help="our student's grid, or none [int4]")
    add("--device", default="cpu", help="cpu or cuda [cpu]")
    add("--dtype", default="auto", help="as train.py's [auto]")
    add("--with", default="", help="extras that replace functions of the loop, by commas")
    add("--peer", choices=["trl"], help="also time TRL's SDFTTrainer, in float32 and bfloat16")
    add("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def prompts(n):
    """The first n questions about elements, as chats."""
    import data
    examples = data.load_task("science").train
    return [[{"role": "user", "content": e.prompt}] for e in (examples * n)[:n]]


def now(device):
    """Seconds, after what a GPU was asked to do is done."""
    if device != "cpu":
        import torch
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_gib(device):
    """The most memory that this process has held so far, beside the CPU or on a GPU."""
    import resource

    import torch
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def ours(o):
    """Seconds a step of sdft.recover, by part: the median over the steps after the warm-up."""
    import torch

    import model
    import quant
    import sdft
    import train
    argv = ["--dtype", o.dtype, "--device", o.device, *(["--with", vars(o)["with"]]
                                                        if vars(o)["with"] else [])]
    c, extras = train.parse(argv)
    parts = dict(train.PARTS, config=c)
    for extra in extras:
        extra.attach(parts)
    fast = torch.cpu._is_avx512_bf16_supported() or o.device != "cpu"
    dtype = getattr(torch, ("bfloat16" if fast else "float32") if o.dtype == "auto" else o.dtype)
    folder = model.resolve(o.model)
    ids = [parts["tokenizer"](folder).chat(p) for p in prompts(o.batch_size)]
    student = model.GPT.from_pretrained(folder, device=o.device)
    teacher = model.frozen_copy(student, dtype)
    for name, p in student.named_parameters():
        p.requires_grad_(not name.startswith(("embed_", "lm_head")))
    if o.degrade != "none":
        quant.quantize_(student, o.degrade, 64)
    quant.compute_in_(student, dtype)
    spent, steps = dict.fromkeys(("rollout", "score", "backward"), 0.0), []

    def timed(name, function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            began = now(o.device)
            result = function(*args, **kwargs)
            spent[name] += now(o.device) - began
            return result
        return run

    def log(line):
        """Close a step: what no clock has seen is the quantizer's and the optimizer's."""
        steps.append({**spent, "other": line["seconds"] - sum(spent.values()),
                      "total": line["seconds"]})
        spent.update(dict.fromkeys(spent, 0.0))

    rollout = functools.partial(parts["generate"], max_new_tokens=o.new_tokens,
                                batch_size=o.batch_size, generator=torch.Generator().manual_seed(0))
    batches = [[sdft.Prompt(i, i) for i in ids]] * (o.warmup + o.steps)
    sdft.recover(student, teacher, batches, timed("rollout", rollout), loss=sdft.reverse_kl,
                 score=timed("score", parts["score"]), log=log, progress="",
                 backward=timed("backward", parts["backward"]))
    steps = steps[o.warmup:]
    return {"seconds": {part: statistics.median(s[part] for s in steps) for part in steps[0]},
            "peak_gib": peak_gib(o.device), "dtype": str(dtype)[6:]}


def trl(o):
    """Seconds a step of TRL's SDFTTrainer: full logits, reverse KL, the initial model teaches."""
    import datasets
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    import model
    folder, steps, seconds = str(model.resolve(o.model)), o.warmup + o.steps, []
    rows = [{"prompt": p, "privileged_context": ""} for p in prompts(o.batch_size)] * steps

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seconds.append(now(o.device))

    with tempfile.TemporaryDirectory() as out:
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
            datasets.Dataset.from_list(rows), callbacks=[Clock()],
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left"))
        began = now(o.device)
        trainer.train()
    each = [b - a for a, b in zip([began, *seconds], seconds)][o.warmup:]
    return {"seconds": {"total": statistics.median(each)}, "peak_gib": peak_gib(o.device),
            "dtype": o.dtype}


def measure(o, kind, **changes):
    """What one child prints: its results."""
    settings = {**vars(o), "child": kind, "peer": "", **changes}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value]
    done = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})
    if done.returncode:
        sys.exit(f"error: the {kind} benchmark failed (exit code {done.returncode}); see above")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None):
    """The command line; a child prints its results as JSON, the parent all of them as text."""
    o = options(argv)
    if o.child:
        print(json.dumps({"ours": ours, "trl": trl}[o.child](o)))
        return
    asked = [("ours", {})] + [("trl", {"dtype": d}) for d in ("float32", "bfloat16") if o.peer]
    base = None
    for kind, changes in asked:
        r = measure(o, kind, **changes)
        base = base or r
        parts = " ".join(f"{part} {s:.2f}" for part, s in r["seconds"].items() if part != "total")
        ratio = "" if r is base else (
            f"  ours: {base['seconds']['total'] / r['seconds']['total']:.2f} of the time, "
            f"{base['peak_gib'] / r['peak_gib']:.2f} of the memory")
        print(f"{kind} {r['dtype']:10}{r['seconds']['total']:8.2f} s/step {r['peak_gib']:6.2f} GiB "
              f" {parts}{ratio}", flush=True)


if __name__ == "__main__":
    main()
