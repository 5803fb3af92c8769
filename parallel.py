"""One job on several processes: which one this is, what its share of the work is, and how shares
come together; and what the machine is good at.

    torchrun --nproc_per_node 2 train.py           # a whole student each, gradients summed
    torchrun --nproc_per_node 8 train.py --shard   # parameters, gradients, optimizer cut (FSDP2)

torchrun starts the processes and tells each its number. Without it there is one, and everything
here passes through. All read the same files and take the same steps. Rollouts, the batch, and what
is measured are shared out; process 0 alone writes.
"""
import contextlib
import ctypes
import os
import platform
import resource
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from model import GPT, frozen_copy


class PeerLost(Exception):
    """Another process of the run has died, so that this one cannot go on."""


def start(device):
    """Join the others, if there are any; returns this process's own device."""
    global store
    if not dist.is_torchelastic_launched():
        return device
    wanted = device.startswith("cuda")
    cuda = wanted and int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if wanted else device
    if cuda:
        torch.cuda.set_device(device)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False)  # torchrun keeps it, also when it restarts
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    signal.signal(signal.SIGTERM, _peer_lost)  # what torchrun sends when another one has died
    return device


def _peer_lost(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # time to say so
    raise PeerLost from None


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def watching_peers():
    """PeerLost, if another process dies while this one waits for it in the body."""
    try:
        yield
    except RuntimeError as error:
        if size() == 1 or "onnection" not in str(error):
            raise
        _peer_lost()


def first_to_speak():
    """True in one process only, whichever asks first; before they have joined, the first."""
    if not dist.is_initialized():
        return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"
    return size() == 1 or store.add("spoken", 1) == 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def first():
    """Process 0 goes through the body before the others: it downloads, they find."""
    if size() > 1 and rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if size() > 1 and rank() == 0:
            dist.barrier()


def wait():
    """Until all processes are here."""
    if size() > 1:
        dist.barrier()


def share(items):
    """This process's items, a contiguous part of them."""
    return items[len(items) * rank() // size():len(items) * (rank() + 1) // size()]


def gather(items):
    """The lists of all processes, joined in their order: gather([f(i) for i in share(items)])."""
    if size() == 1:
        return items
    lists = [None] * size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def reduce_(parameters, line):
    """The whole batch's gradients and logged sums, in place, from those of its shares.

    FSDP has added up the gradients, and divided them by the number of processes.
    """
    if size() == 1:
        return
    for p in parameters:
        if isinstance(p, DTensor):
            p.grad.mul_(size())
        else:
            dist.all_reduce(p.grad)
    for name in ("loss", "kl", "cka"):  # in one order on all processes
        if name in line:
            line[name] = sum(gather([line[name]]))


def shard_(model):
    """Cut parameters, and with them gradients and optimizer states, into one share a process, block
    by block (FSDP2).

    Blocks are put together while they compute. Embeddings and head stay so from forward to
    backward, since `model.head` is called in between.
    """
    mesh = init_device_mesh(model.device.type, (size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "backbone")
    model.named_weights = lambda: whole(model).named_weights()


def reshard_(model):
    """After a forward pass without a backward: put-together weights must not outlive a step."""
    if sharded(model):
        model.reshard()


def sharded(model):
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(model, dtype=None):
    """The model itself; of a sharded one a plain copy in dtype (as it is held, if None), on every
    process."""
    if not sharded(model):
        return model
    with torch.device("meta"):
        plain = GPT(model.config)
    names, state = [name for name, _ in plain.named_parameters()], {}
    parts = [(f"layers.{i}.", layer) for i, layer in enumerate(model.layers)]
    for beginning, part in [*parts, ("", model)]:
        part.unshard()
        for name in names:
            if name.startswith(beginning) and name not in state:
                w = model.weight(name)
                state[name] = w.to(dtype or w.dtype, copy=True)
        part.reshard()
    plain.load_state_dict(state, assign=True)
    return plain.requires_grad_(False).eval()


def plain_copy(model, dtype):
    """A plain copy in dtype that does not train, on every process; a sharded model is put together
    once, not copied again."""
    return whole(model, dtype) if sharded(model) else frozen_copy(model, dtype)


# ----------------------------------------------------------------------------------- the machine

def bfloat16_is_fast(device):
    """Whether the processor has instructions that multiply matrices of bfloat16."""
    if device.startswith("cuda"):  # is_bf16_supported counts emulation, too
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def processor(device):
    """Its name; a CPU's where Linux tells, with the vector instructions that decide its speed."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def give_back_freed_memory():
    """To the system, where there is glibc: freed blocks do not fit what is measured next, and a
    training, whose batches are of all lengths, would gather more and more of them."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def peak_memory_gib(device="cpu"):
    """The most memory that this process has held so far, beside the CPU or on a GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
