"""GPT, Llama and Qwen2 as one class: a decoder-only transformer read from a Hugging Face folder, and batched generation.

One `GPTConfig` describes them all; what differs is learned positions or RoPE, LayerNorm or RMSNorm, a plain or a gated
FFN, and which linears carry a bias. Sub-modules carry the names of a Llama checkpoint, so that loading is (almost) a
copy. Shapes: B rows, T tokens of this call, S tokens in the cache, D model width, H heads, G key-value heads, K head width,
V vocabulary. Nothing here pads on the left: whatever padding comes in is turned into right padding, under which a causal
model needs no attention mask (a real token never looks to its right) and a token's position is its column.
"""
import contextlib
import functools
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors on huge pages: fewer page faults, 5 % of a step's time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import hf_folder
from hf_folder import existing, require


@dataclass
class GPTConfig:
    """Sizes and switches of one decoder; `from_hf` and `to_hf` translate config.json."""

    model_type: str = "llama"       # gpt2 | llama | qwen2
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
    hf: dict = field(default_factory=dict, repr=False, compare=False)  # its config.json; unknown keys are kept on saving

    @classmethod
    def from_hf(cls, hf):
        """GPTConfig from a config.json dict. ValueError on an architecture this file does not implement."""
        return cls(**hf_folder.fields_of(hf))

    def to_hf(self):
        """The config.json dict that `from_hf` and transformers read."""
        return hf_folder.config_json(self)


class KVCache:
    """Keys and values of every token seen so far: k, v [n_layer, B, S, G, K]; `length[b]` tokens are held by row b."""

    def __init__(self, model, rows, capacity):
        c, device = model.config, model.device
        shape = (c.n_layer, rows, capacity, c.n_kv_head, c.head_dim)
        self.k = torch.zeros(shape, dtype=attention_dtype(device, model.norm.weight.dtype), device=device)
        self.v = torch.zeros_like(self.k)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)

    def keep(self, rows):
        """Keep these rows only, a rising list of indices: finished rows cost nothing more."""
        for x in (*self.k, *self.v):  # in place: a new block of this size costs more than the copy
            x[:len(rows)] = x[rows]
        self.k, self.v, self.length = self.k[:, :len(rows)], self.v[:, :len(rows)], self.length[rows]


def apply_rope(x, cos, sin):
    """Rotate pairs (i, i + K/2) of x [B, T, heads, K] by their positions' angles; cos, sin [B or 1, T, 1, K] of `_rope`."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


# A packed batch is one sequence [1, N] made of groups of rows. A group (P, B, T) is P tokens that its B rows begin with, once,
# and then T tokens of each row's own. All but attention treats every token alike, and does so in one go.

def unpack(x, group):
    """A group's part of a packed batch, [1, P + B T, ...] -> its whole rows [B, P + T, ...]."""
    P, B, T = group
    common, own = x.split((P, B * T), dim=1)
    own = own.reshape(B, T, *own.shape[2:])
    return torch.cat((common.expand(B, -1, *own.shape[2:]), own), dim=1)


def pack(x, group):
    """The inverse; the common beginning is taken from the first row."""
    return torch.cat((x[0, :group[0]], x[:, group[0]:].flatten(0, 1)))[None]


def linear(x, w, b=None):
    """x [..., in] -> [..., out], as one product of matrices; w may lie in oneDNN's blocked layout."""
    if w.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    return F.linear(x.reshape(-1, x.size(-1)), w, b).view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """nn.Linear by way of `linear`."""

    blocked = None  # see `blocked_weights`

    def forward(self, x):
        return linear(x, *(self.blocked or (self.weight, self.bias)))


def together(x, *linears):
    """[linear(x) for each]; as one product where `blocked_weights` has laid the weights side by side."""
    if linears[0].blocked:
        return linears[0](x).split([linear.out_features for linear in linears], dim=-1)
    return [linear(x) for linear in linears]


@contextlib.contextmanager
def blocked_weights(model, rows):
    """While about `rows` sequences are decoded on a CPU, linears and head use copies of their weights in oneDNN's blocked layout.

    A decoding step multiplies every weight by a few rows. From the copies, those of one input side by side, that takes half to
    four fifths of the time; making them takes as long as three steps. The results are the same up to rounding.
    """
    sets, dtype = [], model.norm.weight.dtype
    fast = torch.backends.mkldnn.is_available() and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if model.device.type == "cpu" and fast and rows:
        for part in (part for layer in model.layers for part in (layer.self_attn, layer.mlp)):
            *inputs, output = part.children()  # q, k, v and o; gate, up and down
            sets += [inputs, [output]]
        model.blocked = (torch.ops.mkldnn._reorder_linear_weight(model.head_weight.detach(), rows),)
    for linears in sets:
        w = torch.cat([linear.weight for linear in linears]).detach()
        b = torch.cat([linear.bias for linear in linears]) if linears[0].bias is not None else None
        linears[0].blocked = torch.ops.mkldnn._reorder_linear_weight(w, rows), b
    try:
        yield
    finally:
        for module in (model, *(linears[0] for linears in sets)):
            module.blocked = None


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = Linear(c.d_model, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_head * c.head_dim, c.d_model, bias=c.out_bias)

    def forward(self, x, rope, memory, groups):
        """x [B, T, D] -> [B, T, D]; rope is (cos, sin) or None; memory is (k, v, positions, mask) of this layer or None;
        groups is None or those of a packed batch."""
        B, T, _ = x.shape
        dtype = attention_dtype(x.device, x.dtype)
        q, k, v = (z.view(B, T, -1, self.c.head_dim).to(dtype) for z in together(x, self.q_proj, self.k_proj, self.v_proj))
        if rope:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if memory:
            past_k, past_v, positions, mask = memory
            rows = torch.arange(B, device=x.device)[:, None]
            past_k[rows, positions], past_v[rows, positions] = k, v  # right padding is overwritten by what comes next
            y = attend(q, k, v) if mask is None else attend(q, past_k[:, :mask.size(-1)], past_v[:, :mask.size(-1)], mask)
        elif groups:
            parts = zip(*(z.split([P + B * T for P, B, T in groups], dim=1) for z in (q, k, v)))
            y = torch.cat([pack(attend(*(unpack(z, g) for z in part)), g) for part, g in zip(parts, groups)], dim=1)
        else:
            y = attend(q, k, v)
        return self.o_proj(y.reshape(B, T, -1).to(x.dtype))


def attention_dtype(device, dtype):
    """Attention proper is float32 on a CPU: its bfloat16 kernel is 12 times slower at one query, 3 times in backward."""
    return torch.float32 if device.type == "cpu" else dtype


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(K)) v: q [B, T, H, K], k and v [B, S, G, K] -> [B, T, H, K]; causal without a mask [B, 1, T, S]."""
    shape, (q, k, v) = q.shape, (x.transpose(1, 2) for x in (q, k, v))
    if mask is not None and q.size(2) == 1:  # one token: the H/G queries that share keys become the rows of one product
        return F.scaled_dot_product_attention(q.reshape(len(q), k.size(1), -1, q.size(3)), k, v, attn_mask=mask).reshape(shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          enable_gqa=k.size(1) < q.size(1)).transpose(1, 2)


class MLP(nn.Module):
    """The feed-forward network: down(silu(gate(x)) * up(x)) for Llama and Qwen2, down(gelu(up(x))) for GPT-2."""

    def __init__(self, c):
        super().__init__()
        if c.model_type != "gpt2":
            self.gate_proj = Linear(c.d_model, c.d_ff, bias=c.mlp_bias)
        self.up_proj = Linear(c.d_model, c.d_ff, bias=c.mlp_bias)
        self.down_proj = Linear(c.d_ff, c.d_model, bias=c.mlp_bias)

    def forward(self, x):
        if hasattr(self, "gate_proj"):
            gate, up = together(x, self.gate_proj, self.up_proj)
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, c):
        super().__init__()
        norm = nn.LayerNorm if c.model_type == "gpt2" else nn.RMSNorm
        self.input_layernorm = norm(c.d_model, eps=c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = norm(c.d_model, eps=c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, memory, groups):
        x = x + self.self_attn(self.input_layernorm(x), rope, memory, groups)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    """The whole decoder. `forward` is `head(backbone(ids))`; call the two parts to pay for fewer logits."""

    blocked = None  # see `blocked_weights`
    checkpointing = False  # keep a block's input only, and compute the block again in backward: less memory, a third more time

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.d_model)
        if c.model_type == "gpt2":
            self.embed_positions = nn.Embedding(c.context_length, c.d_model)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = type(self.layers[0].input_layernorm)(c.d_model, eps=c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = Linear(c.d_model, c.vocab_size, bias=False)

    def forward(self, ids, mask=None, cache=None, hidden=False):
        """ids [B, T] -> logits [B, T, V]; with hidden=True -> (logits, hidden). Arguments as `backbone`."""
        x = self.backbone(ids, mask, cache, hidden)
        return (self.head(x[0]), x[1]) if hidden else self.head(x)

    def head(self, x):
        """Final hidden states [..., D] -> logits [..., V]."""
        return linear(x, *(self.blocked or (self.head_weight,)))

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def head_weight(self):
        """[V, D]: the embedding matrix where the two are tied."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def backbone(self, ids, mask=None, cache=None, hidden=False, groups=None):
        """ids [B, T] -> final hidden states [B, T, D], after the last norm.

        mask [B, T] bool, True = a real token; padding may stand on either side, what comes out at it means nothing.
        cache (KVCache) holds the tokens before these and takes these in. With hidden=True -> (x, [h_1 … h_L]),
        the blocks' outputs [B, T, D], the last after the final norm: transformers' `hidden_states[1:]`.
        groups: ids [1, N] is a packed batch of these (with neither mask nor cache), and so is what is returned.
        ValueError if a row would outgrow the context.
        """
        B, T = ids.shape
        if mask is not None:  # move padding of either side to the right end
            order = mask.int().argsort(dim=1, descending=True, stable=True)
            ids = ids.gather(1, order)
        start = cache.length if cache else torch.zeros(1, dtype=torch.long, device=ids.device)
        longest = max(P + T for P, _, T in groups) if groups else int(start.max()) + T
        require(longest <= self.config.context_length,
                 f"{longest} tokens are longer than the model's context of {self.config.context_length}")
        positions = start[:, None] + torch.arange(T, device=ids.device)  # [B or 1, T]
        if groups:
            positions = torch.cat([pack(torch.arange(g[0] + g[2], device=ids.device).expand(g[1], -1), g) for g in groups], dim=1)
        x = self.embed_tokens(ids)
        if self.config.model_type == "gpt2":
            x = x + self.embed_positions(positions)
        rope, visible = self._rope(positions, attention_dtype(x.device, x.dtype)), None
        if cache and longest > T:  # a token at position p sees the keys at positions <= p
            visible = (torch.arange(longest, device=ids.device) <= positions[..., None])[:, None]  # [B, 1, T, S]
        states = []
        for i, layer in enumerate(self.layers):
            memory = (cache.k[i], cache.v[i], positions, visible) if cache else None
            again = self.checkpointing and torch.is_grad_enabled()
            x = (functools.partial(checkpoint, layer, use_reentrant=False) if again else layer)(x, rope, memory, groups)
            states += [x] if hidden else []
        x = self.norm(x)
        states[-1:] = [x] if hidden else []
        if cache:
            cache.length = cache.length + (T if mask is None else mask.sum(1))
        if mask is not None:
            back = order.argsort(dim=1)[..., None]
            x, *states = [h.gather(1, back.expand_as(h)) for h in (x, *states)]
        return (x, states) if hidden else x

    def _rope(self, positions, dtype):
        """(cos, cos), (-sin, sin) [B or 1, T, 1, K] of the angles position * theta^(-2i/K), in float32 until the last moment."""
        if self.config.model_type == "gpt2":
            return None
        half = torch.arange(0, self.config.head_dim, 2, device=positions.device).float()
        angles = positions[..., None].float() * self.config.rope_theta ** (-half / self.config.head_dim)
        cos, sin = angles.cos()[:, :, None].to(dtype), angles.sin()[:, :, None].to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Read a Hugging Face folder: config.json and *.safetensors, one file or several with an index.

        FileNotFoundError for a missing folder or file; ValueError for an architecture this file does not
        implement, and for a tensor that is missing, unknown or of another shape. Each message is one line.
        """
        path = Path(folder)
        try:
            config = GPTConfig.from_hf(json.loads(existing(path / "config.json").read_text()))
            with torch.device("meta"):
                model = cls(config)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}/config.json: {'no entry ' * isinstance(error, KeyError)}{error}") from None
        tensors = hf_folder.read_tensors(path)
        state = {}
        for name, p in model.named_parameters():
            key, part, transposed = hf_folder.tensor_name(config, name)
            require(key in tensors, f"{path}: tensor {key} is missing from the safetensors files")
            w = tensors[key].T if transposed else tensors[key]
            w = w if part is None else w.chunk(3)[part]
            require(w.shape == p.shape, f"{path}: tensor {key} has shape {tuple(tensors[key].shape)}, which does not "
                                         f"fit {tuple(p.shape)} from config.json")
            state[name] = w.to(device, dtype).contiguous()
        known = {hf_folder.tensor_name(config, name)[0] for name in state}
        unknown = [k for k in tensors if k not in known and not k.endswith((".attn.bias", "masked_bias", "inv_freq"))
                   and k != "lm_head.weight"]
        require(not unknown, f"{path}: tensor {unknown[:1]} has no place in a {config.model_type} model")
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which transformers loads; whole or not at all.

        Parametrized weights (quantized, masked) are written as they act, not as the optimizer holds them; what
        `quant.compute_in_` rounds is written unrounded.
        """
        with torch.device("meta"):
            names = [name for name, _ in GPT(self.config).named_parameters()]
        parts = {}
        for name in names:
            parts.setdefault(hf_folder.tensor_name(self.config, name)[::2], []).append(exact_weight(self, name).cpu())
        tensors = {key: (torch.cat(w).T if transposed else torch.cat(w)).contiguous() for (key, transposed), w in parts.items()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        widest = functools.reduce(torch.promote_types, (w.dtype for w in tensors.values()))
        tensors, dtype = {key: w.to(widest) for key, w in tensors.items()}, str(widest).removeprefix("torch.")
        save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
        config = {**self.config.to_hf(), "torch_dtype": dtype, "dtype": dtype}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(folder / "model.safetensors.part", folder / "model.safetensors")


@torch.no_grad()
def exact_weight(model, name):
    """A parameter, by its name in a plain GPT, as its parametrizations make it, but for rounding to the type of computation."""
    module, _, name = name.rpartition(".")
    module = model.get_submodule(module)
    steps = module.parametrizations[name] if parametrize.is_parametrized(module, name) else ()
    w = steps.original if steps else getattr(module, name)
    for step in steps:
        w = step(w) if getattr(step, "changes_the_model", True) else w
    return w.detach()


def frozen_copy(model, dtype):
    """A plain copy of a model, as it acts, in dtype; it does not train."""
    with torch.device("meta"):
        plain = GPT(replace(model.config))  # a copy, as removing neurons changes it
    state = {name: exact_weight(model, name).to(dtype, copy=True) for name, _ in plain.named_parameters()}
    plain.load_state_dict(state, assign=True)
    return plain.requires_grad_(False).eval()


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, eos_id=None, generator=None, batch_size=64, rows=None):
    """Continue each prompt (a list of token ids) until eos_id or max_new_tokens; the completions, eos included.

    With rows, indices of some prompts, only theirs are made and returned, the same as among all the others.

    temperature 0 is greedy. Prompts of like length run together, batch_size at a time, on a KV cache; what all of them begin
    with is read once, and a finished row leaves the batch. Every row has its own random numbers, one uniform number a token
    from `generator` (torch.Generator on the CPU), so that its completion does not depend on its neighbours.
    """
    require(all(prompts), "a prompt has no tokens")
    u = torch.rand(len(prompts), max_new_tokens, generator=generator) if temperature > 0 else None
    rows = range(len(prompts)) if rows is None else rows
    done, order = {i: [] for i in rows}, sorted(rows, key=lambda i: len(prompts[i]))
    with blocked_weights(model, min(batch_size, len(order))):
        for start in range(0, len(order), batch_size):
            alive = order[start:start + batch_size]
            _generate_batch(model, prompts, alive, done, max_new_tokens, temperature, top_p, eos_id, u)
    return list(done.values())


def _generate_batch(model, prompts, alive, done, max_new_tokens, temperature, top_p, eos_id, u):
    """Fill done[i] for the rows i in `alive`."""
    device = model.device
    rows = [prompts[i] for i in alive]  # shortest first
    shared = len(os.path.commonprefix([rows[0][:-1], *rows]))  # a system message, say, is read once
    cache = KVCache(model, len(rows), len(rows[-1]) + max_new_tokens)
    if shared:
        beginning = KVCache(model, 1, shared)
        model.backbone(torch.tensor([rows[0][:shared]], device=device), cache=beginning)
        cache.k[:, :, :shared], cache.v[:, :, :shared] = beginning.k, beginning.v
        cache.length += shared
    ids, mask = pad([row[shared:] for row in rows], device)
    x = model.backbone(ids, mask, cache)
    x = x[torch.arange(len(alive)), mask.sum(1) - 1]  # [B, D] at each row's last token
    for step in range(max_new_tokens):
        draw = u[alive, step].to(device) if temperature > 0 else None
        tokens = sample(model.head(x), temperature, top_p, draw)
        for i, token in zip(alive, tokens.tolist()):
            if not done[i] or done[i][-1] != eos_id:
                done[i].append(token)
        rows = [b for b, i in enumerate(alive) if done[i][-1] != eos_id]
        if not rows or step + 1 == max_new_tokens:
            return
        if len(rows) <= 7 / 8 * len(alive):  # a copy of the cache costs as much as an eighth of the rows for a few steps
            alive, tokens = [alive[b] for b in rows], tokens[rows]
            cache.keep(rows)
        x = model.backbone(tokens[:, None], cache=cache)[:, 0]


def sample(logits, temperature, top_p=1.0, u=None):
    """One token id [B] per row of logits [B, V]: the arg-max at temperature 0, else by inverting the CDF at u [B] in [0, 1).

    top_p < 1 keeps the fewest tokens whose probabilities sum to top_p (nucleus sampling).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = p.sort(dim=-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)
        p = torch.zeros_like(p).scatter(-1, order, ranked)
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=logits.size(-1) - 1)


def pad(rows, device="cpu"):
    """Lists of ids -> ids [B, T], right-padded with 0, and mask [B, T], True = real."""
    length = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(length.max()), dtype=torch.long)
    for row, values in zip(ids, rows):
        row[:len(values)] = torch.tensor(values)
    return ids.to(device), (torch.arange(ids.size(1)) < length[:, None]).to(device)
