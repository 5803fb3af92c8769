"""A GPU run without a GPU: tensors that say they lie on cuda:0, are computed on the CPU, and refuse
to meet one that lies there.

So the runs below, of one Llama in one process, are seen never to mix devices. Of speed, memory and
CUDA's own kernels this says nothing.
"""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import train

pytestmark = pytest.mark.usefixtures("no_picture")
CUDA = torch.device("cuda", 0)
INDEXING = "aten.index.Tensor", "aten.index_put_.default", "aten._index_put_impl_.default"
COPYING = "aten.copy_.default", "aten._to_copy.default"
done_there = set()  # names of the operations whose results lie there


class There(torch.Tensor):
    """A tensor on the pretended GPU: autograd takes it for one on the meta device, and what it
    holds is computed on the CPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="meta")

    def __init__(self, held):
        self.held = held

    device = property(lambda self: CUDA)

    def __getitem__(self, key):
        return super().__getitem__(_lists_as_tensors(key))

    def __setitem__(self, key, value):
        super().__setitem__(_lists_as_tensors(key), value)

    def cpu(self):
        return self.to("cpu")

    def numpy(self, *_, **__):
        raise TypeError("numpy cannot read the memory of a GPU")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


for to_python in ("item", "tolist", "__int__", "__index__", "__float__", "__bool__"):
    setattr(There, to_python, lambda self, name=to_python: getattr(self.held, name)())


def _lists_as_tensors(key):
    """Indices that are lists; torch itself would make them on the meta device."""
    if isinstance(key, tuple):
        return tuple(map(_lists_as_tensors, key))
    return torch.tensor(key) if isinstance(key, list) else key


def compute(func, args, kwargs):
    """One operation of ATen, if all that it takes is on one device; its result is There, if they
    are or it is asked for."""
    asked = kwargs.get("device") and torch.device(kwargs["device"]).type
    if asked == "meta" and torch.utils._device.CURRENT_DEVICE == torch.device("meta"):
        return func(*args, **kwargs)  # `with torch.device("meta")`: it is really meant
    to_there = belongs_there(str(func), asked, args, kwargs)
    kwargs = {**kwargs, "device": "cpu"} if asked else kwargs
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
    result = func(*args, **kwargs)
    if not to_there:
        return result
    done_there.add(str(func))
    return tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, result)


def belongs_there(name, asked, args, kwargs):
    """Whether this operation's result lies there; RuntimeError where a real GPU refuses it."""
    first = isinstance(args[0], There) if args else False
    met = tree_leaves((args, kwargs))
    if name in INDEXING and first:
        met = tree_leaves((args[0], args[2:]))  # a GPU takes indices of the CPU
    there = any(isinstance(x, There) for x in met)
    tensors = [x for x in met if isinstance(x, torch.Tensor) and not isinstance(x, There)]
    here = any(x.dim() for x in tensors)  # a 0-d one may meet any
    if there and here and name not in COPYING:
        raise RuntimeError(f"{name}: tensors of two devices")
    if asked:
        to_there = asked in ("cuda", "meta")
    else:
        to_there = first if name == "aten.copy_.default" else there
    if to_there and any(isinstance(x, torch.Generator) for x in met):
        raise RuntimeError(f"{name}: a generator of the CPU cannot draw on the GPU")
    return to_there


class PretendedGPU(TorchDispatchMode):
    """Within it, torch finds one CUDA device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


@pytest.fixture
def gpu(monkeypatch):
    told = {"_lazy_init": None, "is_available": True, "device_count": 1,
            "get_device_name": "pretended", "get_device_capability": (9, 0),
            "max_memory_allocated": 0}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    on_cpu = torch.tensor  # which goes past a dispatch mode

    def tensor(data, *, device="cpu", **kwargs):
        return on_cpu(data, **kwargs).to(device)
    monkeypatch.setattr(torch, "tensor", tensor)
    done_there.clear()
    with PretendedGPU():
        yield


def test_the_pretended_gpu_refuses_what_a_real_one_does(gpu):
    here, there = torch.ones(3), torch.ones(3, device=CUDA)
    assert there.device == CUDA and (there * 2).device == CUDA
    assert (there * 2).cpu().device.type == "cpu"
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert there[torch.arange(2)].device == CUDA
    refused = [
        lambda: here + there, lambda: torch.cat((there, here)),
        lambda: here[torch.arange(2).to(CUDA)],
        lambda: torch.rand(3, generator=torch.Generator(), device=CUDA), there.numpy,
        lambda: there.index_put_((torch.arange(3),), here)]
    for operation in refused:
        message = "two devices|generator of the CPU|memory of a GPU"
        with pytest.raises((RuntimeError, TypeError), match=message):
            operation()


FEW = ("--steps 2 --expert-steps 1 --forget-steps 1 --batch-size 4 --cka-samples 4 --group-size 16 "
       "--rollout-tokens 3 --eval-tokens 3 --eval-limit 4 --calibration 4")


@pytest.mark.parametrize("options", [
    "--degrade ffn10,wanda30,nf4 --double-quant --recover sdft,kd,sft --text {text},{more}",
    "--forget tooluse --degrade magnitude30,int4 --teacher base,healthy --lora 16 --loss jsd "
    "--top-p 0.9 --weight-decay 0.1",
    "--degrade wanda2:4,int4 --no-symmetric --loss reverse_kl --train-embeddings "
    "--gradient-checkpointing --data tooluse,text",
    "--degrade int4 --ema 0.1 --cka-weight 1 --cka-balance --adam-dtype bfloat16 "
    "--watch cka --patience 1 --steps 7",
    "--degrade int4 --eval {choices} --dtype float32 --micro-batch 2",
    "--student {folder} --degrade nf4 --teacher {folder} --demo none --temperature 0",
    "--bootstrap {folder} --degrade ffn10 --importance weight --recover none,sdft --data science",
    "--plain --degrade int4 --ema 0.1 --cka-weight 1 --loss jsd --micro-batch 2 --eval {choices} "
    "--train-embeddings",
    "--plain --forget tooluse --lora 4 --recover sdft,sft --gradient-checkpointing --top-p 0.9 "
    "--dtype float32",
])
def test_a_run_keeps_everything_where_it_belongs(folder, gpu, options, tmp_path):
    question = '{"prompt": "a", "choices": ["b", "cd"], "answer": 1}\n'
    (tmp_path / "choices.jsonl").write_text(question)
    for name in ("short", "more"):
        (tmp_path / f"{name}.txt").write_text("Some text to measure a perplexity on. " * 4)
    command = (f"--model {folder} --device cuda:0 --out {tmp_path}/out --text {{text}} {FEW} "
               f"{options}")
    command = command.format(choices=tmp_path / "choices.jsonl", text=tmp_path / "short.txt",
                             more=tmp_path / "more.txt", folder=folder)
    assert train.main(command.split()) == 0
    answered_and_trained = {"aten.mm.default", "aten.argmax.default", "aten.silu_backward.default"}
    assert answered_and_trained <= done_there
