"""GPT-2, Llama, Mistral, Qwen2, Qwen3 and SmolLM3 as one class: a decoder-only transformer, batched
generation, and models on disk as Hugging Face lays them out.

One `GPTConfig` describes them all. They differ in learned positions or RoPE (scaled in Llama 3,
left out of some layers in SmolLM3), LayerNorm or RMSNorm (Qwen3 norms queries and keys as well), a
plain or a gated FFN, and which linears carry a bias. Sub-modules carry a Llama checkpoint's names.
Shapes: B rows, T tokens in this call, S tokens in the cache, D model width, H heads, G key-value
heads, K head width, V vocabulary. Padding stands on the right, where a causal model needs no mask
for it: a real token never looks to its right, and a token's position is its column.

Attention has one seam, `attend(q, k, v)`: plain causal attention, or a KVCache's, or one that is
passed in. Everything else treats each token alike.
"""
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The sizes and switches that make one decoder."""

    model_type: str = "llama"       # gpt2 | llama | mistral | qwen2 | qwen3 | smollm3
    vocab_size: int = 49152         # V
    n_layer: int = 30
    d_model: int = 576              # D
    n_head: int = 9                 # H
    n_kv_head: int = 3              # G: query heads share key-value heads in groups of H/G
    head_dim: int = 64              # K
    d_ff: int = 1536                # hidden neurons of the FFN
    context_length: int = 8192
    norm_eps: float = 1e-5
    rope_theta: float = 1e5
    qkv_bias: bool = False
    out_bias: bool = False          # bias of the attention output projection
    mlp_bias: bool = False
    tie_embeddings: bool = True     # the head is the embedding matrix
    activation: str = ""            # key of ACTIVATIONS; "" is silu, in GPT-2 gelu_new
    rope_scaling: dict = field(default_factory=dict)  # as in config.json, see rope_frequencies
    no_rope: tuple = ()             # layers that do without RoPE
    hf: dict = field(default_factory=dict, repr=False, compare=False)  # config.json, as it was read

    def __post_init__(self):
        self.activation = self.activation or ("gelu_new" if self.model_type == "gpt2" else "silu")


ACTIVATIONS: dict[str, Callable] = {  # by their names in a config.json
    "silu": F.silu, "swish": F.silu, "relu": F.relu, "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


# ------------------------------------------------------------------------------------- attention

def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(K)) v: q [B, T, H, K], k and v [B, S, G, K] -> [B, T, H, K].

    Causal without a mask; mask [B, 1, T, S] bool, True = seen.
    """
    B, T, H, K = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is not None and T == 1:  # the H/G queries that share keys become rows of one product
        q = q.reshape(B, k.size(1), -1, K)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, T, H, K)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                       enable_gqa=k.size(1) < H)
    return y.transpose(1, 2)


def attention_dtype(device, dtype):
    """float32 on a CPU, whose bfloat16 kernel is 12 times slower at one query; else dtype."""
    return torch.float32 if device.type == "cpu" else dtype


class KVCache:
    """k, v [n_layer, B, S, G, K] of every token seen so far; row b holds `length[b]` tokens."""

    def __init__(self, model, rows, capacity):
        c, device = model.config, model.device
        shape = (c.n_layer, rows, capacity, c.n_kv_head, c.head_dim)
        dtype = attention_dtype(device, model.norm.weight.dtype)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)

    def attends(self, positions, S):
        """One `attend` a layer: it takes in tokens at `positions` [B, T], all below S, each of
        which sees all up to itself. What is written at padding is overwritten by what comes next.
        """
        B, T = positions.shape
        rows = torch.arange(B, device=positions.device)[:, None]
        columns, mask = torch.arange(S, device=positions.device), None
        if S > T:  # something came before
            mask = (columns <= positions[..., None])[:, None]  # [B, 1, T, S]

        def attend_in_layer(past_k, past_v, q, k, v):
            past_k[rows, positions], past_v[rows, positions] = k, v
            if mask is None:
                return attend(q, k, v)
            return attend(q, past_k[:, :S], past_v[:, :S], mask)

        return [partial(attend_in_layer, k, v) for k, v in zip(self.k, self.v)]

    def begin_with(self, beginning):
        """Put the one row of another cache before every row of this one."""
        P = int(beginning.length)
        self.k[:, :, :P], self.v[:, :, :P] = beginning.k[:, :, :P], beginning.v[:, :, :P]
        self.length += P

    def keep(self, rows):
        """Keep these rows only, a list of indices: finished rows cost nothing more."""
        for x in (*self.k, *self.v):  # in place: a new block of this size costs more than the copy
            x[:len(rows)] = x[rows]
        self.k, self.v = self.k[:, :len(rows)], self.v[:, :len(rows)]
        self.length = self.length[rows]


def rope_frequencies(config, device=None):
    """[K/2]: the angle, in radians, by which each pair turns from a token to the next,
    theta^(-2i/K), scaled as `rope_scaling` says.

    linear: all are slower by `factor`. longrope: each is slower by its own. llama3: those that take
    fewer than original / high tokens for a turn stay, those that take more than original / low are
    slower by `factor`, and those in between take a weighted mean of the two.
    """
    half = torch.arange(0, config.head_dim, 2, device=device).float()
    frequencies, scaling = config.rope_theta ** (-half / config.head_dim), config.rope_scaling
    kind = scaling.get("rope_type")
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "longrope":
        return frequencies / torch.tensor(scaling["short_factor"], device=device)
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies
    return frequencies


def rope_angles(config, positions, dtype):
    """(cos, cos), (-sin, sin) [B or 1, T, 1, K] of the angles position * frequency."""
    frequencies = rope_frequencies(config, positions.device)
    angles = positions[..., None].float() * frequencies  # in float32 until the last moment
    cos, sin = angles.cos()[:, :, None].to(dtype), angles.sin()[:, :, None].to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x, cos, sin):
    """Rotate pairs (i, i + K/2) of x [B, T, heads, K] by `rope_angles`' (cos, cos), (-sin, sin):
    x_i cos - x_{i+K/2} sin, and x_{i+K/2} cos + x_i sin."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class Attention(nn.Module):
    """Self-attention with grouped key-value heads."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.d_model, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.d_model, bias=c.out_bias)
        self.has_norms = c.model_type == "qwen3"
        if self.has_norms:  # of each head's query and key, whose size then changes nothing
            self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)

    def forward(self, x, rope, attend):
        """x [B, T, D] -> [B, T, D]; rope is what `rope_angles` gives, or None."""
        B, T, _ = x.shape
        q, k, v = (linear(x).view(B, T, -1, self.head_dim)
                   for linear in (self.q_proj, self.k_proj, self.v_proj))
        if self.has_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads.to(attention_dtype(x.device, x.dtype)) for heads in (q, k, v))
        if rope:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return self.o_proj(attend(q, k, v).reshape(B, T, -1).to(x.dtype))


# ------------------------------------------------------------------------------------- the model

class MLP(nn.Module):
    """down(act(up(x))) for GPT-2, down(act(gate(x)) * up(x)) for the others."""

    def __init__(self, c):
        super().__init__()
        if c.model_type != "gpt2":
            self.gate_proj = nn.Linear(c.d_model, c.d_ff, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.d_model, c.d_ff, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.d_ff, c.d_model, bias=c.mlp_bias)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x):
        if hasattr(self, "gate_proj"):
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.activation(self.up_proj(x)))


def norm(c):
    return (nn.LayerNorm if c.model_type == "gpt2" else nn.RMSNorm)(c.d_model, eps=c.norm_eps)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = norm(c)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = norm(c)
        self.mlp = MLP(c)

    def forward(self, x, rope, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """The whole decoder: `head(backbone(ids))`. Call the two parts to pay for fewer logits."""

    gradient_checkpointing = False  # keep a block's input alone, compute it again in backward

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.d_model)
        if c.model_type == "gpt2":
            self.embed_positions = nn.Embedding(c.context_length, c.d_model)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = norm(c)
        if not c.tie_embeddings:
            self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)

    def forward(self, ids, lengths=None, cache=None, hidden=False):
        """ids [B, T] -> logits [B, T, V]; with hidden=True -> (logits, hidden)."""
        x = self.backbone(ids, lengths, cache, hidden)
        return (self.head(x[0]), x[1]) if hidden else self.head(x)

    def head(self, x):
        """Final hidden states [..., D] -> logits [..., V]."""
        w = self.head_weight
        return F.linear(x.reshape(-1, x.size(-1)), w).view(*x.shape[:-1], -1)  # 2-D: no copy of w

    @property
    def head_weight(self):
        """[V, D]: the embedding matrix where the two are tied."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    @property
    def device(self):
        return next(self.parameters()).device

    def backbone(self, ids, lengths=None, cache=None, hidden=False, attend=attend, positions=None):
        """ids [B, T] -> final hidden states [B, T, D], after the last norm.

        With hidden=True -> (x, [h_1 … h_L]), the blocks' outputs [B, T, D], the last after the
        final norm. cache (KVCache) holds the tokens before these and takes these in; lengths [B]
        says how many tokens of each row are real, where padding follows them. attend and positions
        [1 or B, T] may be given, for tokens that stand in another order. ValueError if a row
        outgrows the context.
        """
        if positions is None:
            start = cache.length[:, None] if cache else 0
            positions = start + torch.arange(ids.size(1), device=ids.device)[None]
        longest, most = int(positions.max()) + 1, self.config.context_length
        if longest > most:
            raise ValueError(f"{longest} tokens are longer than the model's context of {most}")
        x, rope, states = self.embed_tokens(ids), None, []
        if self.config.model_type == "gpt2":
            x = x + self.embed_positions(positions)
        else:
            rope = rope_angles(self.config, positions, attention_dtype(x.device, x.dtype))
        attends = cache.attends(positions, longest) if cache else [attend] * len(self.layers)
        for i, layer in enumerate(self.layers):
            turned = None if i in self.config.no_rope else rope
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, turned, attends[i], use_reentrant=False)
            else:
                x = layer(x, turned, attends[i])
            if hidden:
                states.append(x)
        x = self.norm(x)
        if cache:
            cache.length = cache.length + (ids.size(1) if lengths is None else lengths)
        return (x, [*states[:-1], x]) if hidden else x

    def stored(self, name):
        """A parameter, by its name in a plain GPT, as the optimizer holds it."""
        owner, _, name = name.rpartition(".")
        module = self.get_submodule(owner)
        steps = parametrizations_of(module, name)
        return steps.original if steps else getattr(module, name)

    @torch.no_grad()
    def weight(self, name):
        """A parameter, by its name in a plain GPT, as it acts: quantized, masked, merged.

        A parametrization that says changes_the_model = False (rounding for speed) is left out.
        """
        w, (owner, _, name) = self.stored(name), name.rpartition(".")
        for step in parametrizations_of(self.get_submodule(owner), name):
            w = step(w) if getattr(step, "changes_the_model", True) else w
        return w.detach()

    def named_weights(self):
        """(name, weight) of every parameter, under its name in a plain GPT, see `weight`."""
        for name in [name for name, _ in self.named_parameters()]:
            if ".parametrizations." not in name or name.endswith(".original"):  # no low-rank factor
                name = name.replace(".parametrizations.", ".").removesuffix(".original")
                yield name, self.weight(name)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """The model in a Hugging Face folder: config.json and *.safetensors.

        ValueError or OSError in one line where `config_of` does not know the architecture, and
        where a tensor is missing, unknown, quantized, not finite, or of another shape.
        """
        folder, head = check_folder(folder), "lm_head.weight"
        config, tensors = read_config(folder), read_tensors(folder)
        prefix = "transformer." if config.model_type == "gpt2" else "model."
        if not any(key.startswith(prefix) for key in tensors):  # stored as a model without a head
            tensors = {key if key == head else prefix + key: w for key, w in tensors.items()}
        if config.tie_embeddings and head in tensors:  # either may be stored; if they differ: both
            w = tensors.setdefault(tensor_name(config, "embed_tokens.weight")[0], tensors[head])
            config.tie_embeddings = torch.equal(w, tensors[head].to(w.dtype))
            if config.tie_embeddings:
                del tensors[head]
        with torch.device("meta"):
            model = cls(config)
        names, state = {name: tensor_name(config, name) for name, _ in model.named_parameters()}, {}
        keys = {key for key, *_ in names.values()}
        for key in sorted(keys ^ tensors.keys()):
            what = "is missing" if key in keys else f"has no place in a {config.model_type} model"
            raise ValueError(f"{folder}: tensor {key} {what}")
        for name, (key, third, transposed) in names.items():
            w = tensors[key].T if transposed else tensors[key]
            w = w if third is None else w.chunk(3)[third]
            if w.shape != model.get_parameter(name).shape:
                raise ValueError(f"{folder}: tensor {key} has shape {tuple(tensors[key].shape)}, "
                                 "which does not fit config.json")
            state[name] = w.to(device, dtype).contiguous()
            if not state[name].isfinite().all():
                raise ValueError(f"{folder}: tensor {key} is not finite in {dtype}")
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder):
        """Write a Hugging Face folder that transformers loads; weights as they act."""
        parts, transposed, folder = {}, {}, Path(folder)
        for name, w in self.named_weights():  # the thirds of a fused QKV come in order
            key, _, transposed[key] = tensor_name(self.config, name)
            parts.setdefault(key, []).append(w.cpu())
        widest = reduce(torch.promote_types, (w.dtype for ws in parts.values() for w in ws))
        tensors = {key: torch.cat(ws).to(widest) for key, ws in parts.items()}
        tensors = {key: (w.T if transposed[key] else w).contiguous() for key, w in tensors.items()}
        config = config_json(self.config) | dict.fromkeys(("torch_dtype", "dtype"), str(widest)[6:])
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "model.safetensors.part"
        try:
            part.touch()
            mode = part.stat().st_mode  # follows the umask, which safetensors' own file does not
            save_file(tensors, part, metadata={"format": "pt"})
            part.chmod(mode)
            (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            os.replace(part, folder / "model.safetensors")
        except SafetensorError as error:  # a full disk
            raise OSError(f"{folder}: {error}") from None
        finally:
            part.unlink(missing_ok=True)


def parametrizations_of(module, name):
    """What a module's parameter goes through before it acts, in order."""
    return module.parametrizations[name] if parametrize.is_parametrized(module, name) else ()


def frozen_copy(model, dtype):
    """A plain copy of a model, as it acts, in dtype; it does not train."""
    with torch.device("meta"):
        plain = GPT(replace(model.config))  # a copy: the removal of neurons changes it
    state = {name: w.to(dtype, copy=True) for name, w in model.named_weights()}
    plain.load_state_dict(state, assign=True)
    return plain.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------ generation

@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, eos_id=None,
             generator=None, batch_size=64, rows=None, done=None):
    """Continue each prompt (a list of token ids) until eos_id (one, or several) or max_new_tokens.

    Returns the completions, eos included; with rows, indices of some prompts, only theirs, the same
    as among all the others. temperature 0 is greedy. Prompts of like length run together,
    batch_size at a time. Every row draws its own random numbers, one a token, from `generator` (on
    the CPU), so that its completion does not depend on its neighbours. done(n) is told how many
    rows have just ended.
    """
    if not all(prompts):
        raise ValueError("a prompt has no tokens")
    u = torch.rand(len(prompts), max_new_tokens, generator=generator) if temperature > 0 else None
    rows = range(len(prompts)) if rows is None else rows
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    order, completions = sorted(rows, key=lambda i: len(prompts[i])), {}
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        choose = partial(sample, temperature=temperature, top_p=top_p)
        drawn = None if u is None else u[batch].to(model.device)
        texts = _continue(model, [prompts[i] for i in batch], max_new_tokens, choose, drawn, ends,
                          done or (lambda n: None))
        completions.update(zip(batch, texts))
    return [completions[i] for i in rows]


def _continue(model, prompts, max_new_tokens, choose, u, ends, done):
    """The completions of one batch of prompts, shortest first; u [B, max_new_tokens] or None."""
    completions, alive = [[] for _ in prompts], list(range(len(prompts)))
    cache, x = _prefill(model, prompts, max_new_tokens)
    for step in range(max_new_tokens):
        tokens = choose(model.head(x), u=None if u is None else u[alive, step])
        ended = 0
        for i, token in zip(alive, tokens.tolist()):
            if not completions[i] or completions[i][-1] not in ends:  # else it has ended before
                completions[i].append(token)
                ended += token in ends or step + 1 == max_new_tokens
        done(ended)
        running = [b for b, i in enumerate(alive) if completions[i][-1] not in ends]
        if not running or step + 1 == max_new_tokens:
            return completions
        if len(running) <= 7 / 8 * len(alive):  # to copy the cache costs as much as 1/8 of the rows
            alive, tokens = [alive[b] for b in running], tokens[running]
            cache.keep(running)
        x = model.backbone(tokens[:, None], cache=cache)[:, 0]
    return completions


def _prefill(model, prompts, room):
    """Read prompts, shortest first, into a KVCache with room for more tokens: the cache, and the
    final states [B, D] of each one's last token. What all of them begin with is read once."""
    device, B = model.device, len(prompts)
    shared = os.path.commonprefix([prompts[0][:-1], *prompts])  # a system message, say
    cache = KVCache(model, B, len(prompts[-1]) + room)
    if shared:
        beginning = KVCache(model, 1, len(shared))
        model.backbone(torch.tensor([shared], device=device), cache=beginning)
        cache.begin_with(beginning)
    tails = [torch.tensor(prompt[len(shared):]) for prompt in prompts]
    lengths = torch.tensor([len(tail) for tail in tails], device=device)
    ids = nn.utils.rnn.pad_sequence(tails, batch_first=True).to(device)
    x = model.backbone(ids, lengths, cache)
    return cache, x[torch.arange(B, device=device), lengths - 1]


def sample(logits, temperature, top_p=1.0, u=None):
    """One token id [B] per row of logits [B, V]: the arg-max at temperature 0, else by inverting
    the CDF at u [B] in [0, 1).

    top_p < 1 keeps the fewest tokens whose probabilities sum to top_p (nucleus sampling).

    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> [sample(logits, 1.0, u=torch.tensor([u])).item() for u in (0.49, 0.51, 0.81)]
    [0, 1, 2]
    >>> sample(logits, 0).item(), sample(logits, 1.0, top_p=0.6, u=torch.tensor([0.99])).item()
    (0, 1)
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = p.sort(dim=-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)
        p = torch.zeros_like(p).scatter(-1, order, ranked)
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.size(-1) - 1)
