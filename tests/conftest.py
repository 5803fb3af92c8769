"""What several test files need: a tiny random model, in memory and as a folder, lists of ids, a
loss of one's own, a run as a process, and a watch on memory. The tests compute on the CPU."""
import json
import multiprocessing
import os
import random
import sys
import threading

# Before torch looks; what the tests start inherits it. Of tiny tensors, several threads only wait.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import data
import model
import quant
import sdft
import train
from data import bytes_to_unicode
from model import GPT, GPTConfig

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES = dict(vocab_size=64, n_layer=2, d_model=32, n_head=4, n_kv_head=2, head_dim=8, d_ff=64,
             context_length=64)
GPT2 = dict(model_type="gpt2", n_kv_head=4, qkv_bias=True, out_bias=True, mlp_bias=True)
QWEN2 = dict(model_type="qwen2", qkv_bias=True, tie_embeddings=False)
QWEN3 = dict(model_type="qwen3", head_dim=12)
SMOLLM3 = dict(model_type="smollm3", no_rope=(1,))

FORK = multiprocessing.get_context("fork")
REGISTRIES = (train.PARTS, train.WAYS, train.DAMAGES, sdft.LOSSES, quant.SCHEMES, quant.BLOCK,
              data.TASKS, data.DEMOS, data.ROWS, data.READERS, model.FORMATS)


def tiny(seed=0, spread=0.2, **changes):
    """A random GPT; its logits have a standard deviation of about 1. It seeds torch's generator.

    changes: of SIZES and of what else is in a GPTConfig. Norm weights lie around 1, all else
    around 0.
    """
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZES | changes))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if name.endswith("norm.weight") else 0.0, spread)
    return model.eval()


def make_folder(path, context_length=1024, seed=0, padding=0, **changes):
    """A loadable Hugging Face folder: a tiny Llama with a tokenizer of single bytes and ChatML.

    changes: of the GPTConfig. The global random state is left as it was.
    """
    vocab = {c: i for i, c in enumerate([*SPECIAL, *bytes_to_unicode()])}
    sizes = dict(vocab_size=len(vocab) + padding, context_length=context_length)
    with torch.random.fork_rng():
        model = tiny(seed, 0.1, **sizes | changes)
    model.save_pretrained(path)
    kind = {"special": True, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False}
    added = [{"id": i, "content": token, **kind} for i, token in enumerate(SPECIAL)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    tokenizer = {"version": "1.0", "added_tokens": added, "normalizer": None,
                 "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
                 "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return path


@pytest.fixture(autouse=True)
def registries_stay_as_they_were():
    """What a test adds to train.PARTS or to another dictionary is gone after it."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before):
        registry.clear()
        registry.update(entries)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny"))


def ragged(rows, seed=0, longest=9):
    """Lists of 1 to `longest` token ids."""
    draw = random.Random(seed)
    return [[draw.randrange(64) for _ in range(draw.randint(1, longest))] for _ in range(rows)]


def squared_distance(student_logits, teacher_logits, mask):
    """A loss of one's own: |p_S - p_T|^2."""
    distance = student_logits.softmax(-1) - teacher_logits.softmax(-1)
    return (distance.square().sum(-1) * mask).sum() / mask.sum()


def slopes(backward, loss, student, s, teacher, t, tokens, **chunk):
    """What a `backward` gives: [loss, KL], its gradient in s, and that in the student's head."""
    student.zero_grad()
    s, tied = s.detach().requires_grad_(), student.config.tie_embeddings
    values = backward(loss, student, s, teacher, t, tokens, **chunk)
    head = student.stored("embed_tokens.weight" if tied else "lm_head.weight")
    return values, s.grad, head.grad


def launch(argv, log, before=lambda: None, **env):
    """A process that runs train.py: a fork of this one, so that nothing is imported again. What it
    says goes into the file `log`; before() is called in it first."""
    process = FORK.Process(target=_program, args=([*map(str, argv)], log, before, env),
                           daemon=True)  # one that hangs does not outlive the tests
    process.start()
    return process


def _program(argv, log, before, env):
    os.environ.update(env)
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them
    tqdm.set_lock(threading.RLock())  # forks share tqdm's, which a killed one may hold for ever
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
    before()
    sys.exit(train.main(argv))


def launch_two(argv, log, before=lambda: None):
    """Two processes of one run, as torchrun starts them; their logs are log-0 and log-1."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    known = {"TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
             "TORCHELASTIC_USE_AGENT_STORE": "True"}
    both = [launch(argv, f"{log}-{n}", before, RANK=str(n), LOCAL_RANK=str(n), **known)
            for n in range(2)]
    for process in both:
        process.store = store  # for as long as they live
    return both


class LiveWide(TorchDispatchMode):
    """Follows the storages of all tensors with `width` columns; `peak` is the most bytes of them
    alive after any operation."""

    def __init__(self, width):
        super().__init__()
        self.width, self.alive, self.peak = width, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dim() and x.size(-1) == self.width:
                storage = x.untyped_storage()
                ref = StorageWeakRef(storage)
                self.alive[ref.cdata] = ref, storage.nbytes()
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def peak_blocks(function, n, v):
    """The most float32 blocks' worth [n, v] of vocabulary-wide tensors alive at once while function
    runs."""
    with LiveWide(v) as live:
        function()
    return live.peak / (4 * n * v)
