"""What this machine is, what it is fast at, and how much of its memory and time a run has taken."""
import contextlib
import ctypes
import platform
import resource
import sys
import time
from pathlib import Path

import torch


def keep_freed_memory():
    """Tell glibc, where it is, to keep freed blocks for the next tensor: from the system every page anew costs a fault."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2 ** 30)      # M_MMAP_THRESHOLD: no block of its own for anything smaller
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: give nothing back before so much is free


@contextlib.contextmanager
def timed(seconds, name):
    """seconds[name] = how long the body took."""
    began = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - began


def peak_memory_gib():
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def bfloat16_is_fast(device):
    """Whether the processor has instructions that multiply matrices of bfloat16."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)  # is_bf16_supported counts emulation, too
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def processor(device):
    """Its name; a CPU's where Linux tells, with the vector instructions that decide its speed."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
