"""One run on several processes, and with less memory.

    torchrun --nproc_per_node 2 train.py --with scale            # a whole student each
    torchrun --nproc_per_node 8 train.py --with scale --shard    # a part of it each (FSDP2)

All processes read the same files and take the same steps. They share out each batch, the rollouts
and what is measured. Their gradients and results are then put together, and process 0 alone
prints and writes. On CUDA each process has a device. --gradient-checkpointing and --adam-dtype
bfloat16 save memory with one process too.
"""
import atexit
import os
import sys
import traceback
import weakref

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import train
from model import GPT, frozen_copy

OPTIONS = {
    "shard": (False, "cut parameters, gradients and optimizer into one part a process (FSDP2)"),
    "gradient_checkpointing": (False, "compute activations again in backward: less memory, slower"),
    "adam_dtype": ("float32", "type of AdamW's two moments: float32, or bfloat16 for half of it")}


def attach(parts):
    """Join the other processes, if there are any, and put what works with them into `parts`."""
    c, size = parts["config"], int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        join(c, parts, size)
    train.require(c.adam_dtype in ("float32", "bfloat16"),
                  f"--adam-dtype takes float32 or bfloat16, not {c.adam_dtype}")
    train.require(size > 1 or not c.shard, "--shard needs several processes: start the run by "
                                           "torchrun --nproc_per_node 2 train.py")
    train.require(c.batch_size % size == 0, f"{size} processes cannot share --batch-size "
                                            f"{c.batch_size} evenly")
    if c.adam_dtype == "bfloat16":
        parts["optimizer"] = CompactAdamW
    before = dict(parts)

    def ready(student):
        train.require(parts["generate"] is generate, "--with: scale comes after fast")
        student = before["ready"](student)
        student.gradient_checkpointing = c.gradient_checkpointing
        return shard_(student, size) if c.shard else student

    def generate(gpt, *args, **kwargs):
        """A plain copy generates: processes that share weights would have to say as much each."""
        plain = isinstance(gpt, FSDPModule)
        gpt = frozen_copy(gpt, getattr(torch, c.dtype)) if plain else gpt
        return before["generate"](gpt, *args, **kwargs)
    parts.update(ready=ready, generate=generate, cached=not c.shard)


def join(c, parts, size):
    """Become one of `size` processes, as torchrun says by environment variables."""
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    if rank > 0:  # silent, but not where it breaks
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
    cuda = c.device.startswith("cuda")
    if cuda:
        found = torch.cuda.device_count()
        train.require(int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= found,
                      f"each process takes a CUDA device, and this torch sees {found}")
        c.device = f"cuda:{local}"
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
        atexit.register(dist.destroy_process_group)
    score = parts["score"]

    def share(items):
        """This process's items, a contiguous part of them."""
        return items[len(items) * rank // size:len(items) * (rank + 1) // size]

    def score_none_too(model, prompts, completions, hidden=False):
        """A process without rows goes through the model like the others, who wait for it there."""
        if prompts:
            return score(model, prompts, completions, hidden)
        return score(model, [[0]], [[0]], hidden)[:, :0]

    def first(function):
        """The function in process 0 alone; the others wait, and its error is theirs too."""
        def call(*args):
            error = [None]
            if rank == 0:
                try:
                    function(*args)
                except (ValueError, OSError) as broken:
                    error = [broken]
            dist.broadcast_object_list(error)
            if error[0]:
                raise error[0]
        return call

    parts.update(share=share, gather=gather, reduce=reduce, processes=size, rank=rank,
                 score=score_none_too, begin=first(parts["begin"]),
                 write=first(parts["write"]))
    if rank > 0:
        parts["log"] = lambda c, line: None


def gather(items):
    """The lists of all processes, joined in their order: gather([f(i) for i in share(items)])."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    for student in sharded:  # a forward pass without backward left parts of it together
        student.reshard()
    return [item for part in lists for item in part]


sharded: weakref.WeakSet = weakref.WeakSet()  # students that are being trained in parts


def reduce(parameters, line):
    """Add up gradients and losses over the processes, in place."""
    for p in parameters:
        if isinstance(p, DTensor):
            p.grad.mul_(dist.get_world_size())  # FSDP has taken their mean
        else:
            dist.all_reduce(p.grad)
    for name in ("loss", "kl", "cka"):  # in one order in all processes
        if name in line:
            line[name] = sum(gather([line[name]]))


def shard_(student, size):
    """Leave each process one part of every parameter (FSDP2); gradients and moments follow.

    A block is put together while it computes. Embeddings and head stay together from forward to
    backward, since `head` is called in between.
    """
    mesh = init_device_mesh(student.device.type, (size,))
    for layer in student.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(student, "backbone")
    with torch.device("meta"):
        names = [name for name, _ in GPT(student.config).named_parameters()]

    def named_weights():
        """As GPT.named_weights, with one block put together at a time."""
        blocks = {f"layers.{i}.": layer for i, layer in enumerate(student.layers)}
        for beginning, part in [*blocks.items(), ("", student)]:
            part.unshard()
            for name in names:
                if name.startswith(beginning) and (beginning or not name.startswith("layers.")):
                    yield name, student.weight(name).clone()
            part.reshard()
    student.named_weights = named_weights
    sharded.add(student)
    return student


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (1711.05101) whose two moments rest in bfloat16, half the memory.

    One parameter at a time is updated in float32. With beta_2 = 0.95 a second moment moves by 5 % a
    step, which bfloat16 resolves (0.4 %). With the usual 0.999 it would stand still.
    """

    def __init__(self, groups, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-8,
                 dtype=torch.bfloat16):
        super().__init__(groups, dict(betas=betas, weight_decay=weight_decay, eps=eps))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient, in place."""
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                state, g = self.state[p], p.grad.float()
                t = state["step"] = state.get("step", 0) + 1
                m = state["m"].float() if t > 1 else torch.zeros_like(g)
                v = state["v"].float() if t > 1 else torch.zeros_like(g)
                m.lerp_(g, 1 - b1)                       # m <- b1 m + (1 - b1) g
                v.mul_(b2).addcmul_(g, g, value=1 - b2)  # v <- b2 v + (1 - b2) g^2
                p.mul_(1 - lr * group["weight_decay"])
                root = (v / (1 - b2 ** t)).sqrt_().add_(group["eps"])
                p.addcdiv_(m / (1 - b1 ** t), root, value=-lr)
                state["m"], state["v"] = m.to(self.dtype), v.to(self.dtype)
