"""Attention written by hand in the ways people write it, from torch.nn, and the other blocks of language models."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import entry

WIDTH, HEADS, LENGTH = 16, 4, 6


def tokens() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH)


class Separate(nn.Module):
    """Query, key and value by themselves; eager or fused attention; optionally grouped queries and rotary positions."""

    def __init__(self, kv: int = HEADS, *, eager: bool = False, rotary: str = "", norm: bool = False) -> None:
        super().__init__()
        self.heads, self.kv, self.size, self.eager, self.rotary = HEADS, kv, WIDTH // HEADS, eager, rotary
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, kv * self.size)
        self.v, self.out = nn.Linear(WIDTH, kv * self.size), nn.Linear(WIDTH, WIDTH)
        self.q_norm = nn.RMSNorm(self.size) if norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.size) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_norm(self.q(x).view(b, t, self.heads, self.size)).transpose(1, 2)
        k = self.k_norm(self.k(x).view(b, t, self.kv, self.size)).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv, self.size).transpose(1, 2)
        if self.rotary:
            q, k = (half_turn(y) if self.rotary == "half" else complex_turn(y) for y in (q, k))
        k, v = (y.repeat_interleave(self.heads // self.kv, 1) for y in (k, v))
        y = eager(q, k, v) if self.eager else F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1), -1e9)
    return scores.softmax(-1) @ v


def _angles(t: int, size: int) -> Tensor:
    return torch.outer(torch.arange(t), 1.0 / 100 ** (torch.arange(0, size, 2) / size))


def half_turn(x: Tensor) -> Tensor:
    angles = _angles(x.shape[2], x.shape[3]).repeat(1, 2)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def complex_turn(x: Tensor) -> Tensor:
    turns = torch.polar(torch.ones(x.shape[2], x.shape[3] // 2), _angles(x.shape[2], x.shape[3]))
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(3)


class Fused(nn.Module):
    """One projection for query, key and value, taken apart in four ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.num_heads, self.head_dim, self.n_embd = how, HEADS, WIDTH // HEADS, WIDTH
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.how == "timm":
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.how == "timm_old":
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0], qkv[1], qkv[2]
        elif self.how == "split":
            q, k, v = (y.view(b, n, self.num_heads, -1).transpose(1, 2) for y in self.qkv(x).split(self.n_embd, dim=2))
        else:
            q, k, v = self.qkv(x).view(b, n, -1, 3 * self.head_dim).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(y.reshape(b, n, c) if self.how == "timm_old" else y.reshape(b, n, -1))


class Einsum(nn.Module):
    """Attention by einsum over bare parameters, one matrix for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(HEADS, WIDTH, 4) / 4) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(HEADS, 4, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,hcd->bhtd", x, w) for w in (self.wq, self.wk, self.wv))
        scores = torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1)
        return torch.einsum("bhts,bhsd,hdc->btc", scores, v, self.wo)


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(3, WIDTH))
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.query).unflatten(-1, (-1, 4)).transpose(0, 1).expand(len(x), -1, -1, -1)
        k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Biased(nn.Module):
    """A learned bias for every head and offset, as in T5 and Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.table = Separate(eager=True), nn.Parameter(torch.randn(2 * LENGTH - 1, HEADS))
        self.register_buffer("offsets", torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None] + LENGTH - 1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        body = self.body
        q, k, v = (f(x).view(b, t, -1, body.size).transpose(1, 2) for f in (body.q, body.k, body.v))
        bias = self.table[self.offsets.view(-1)].view(t, t, -1).permute(2, 0, 1)
        return body.out(((q @ k.transpose(-1, -2) + bias[None]).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Linear(nn.Module):
    """Linear attention: keys and values are contracted first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        return self.out((F.elu(q) @ (k.softmax(2).transpose(-1, -2) @ v)).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, mixer: nn.Module, gated: bool = False, rms: bool = False) -> None:
        super().__init__()
        norm = nn.RMSNorm if rms else nn.LayerNorm
        self.one, self.two, self.mixer = norm(WIDTH), norm(WIDTH), mixer
        self.gate = nn.Linear(WIDTH, 24) if gated else None
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.one(x))
        y = self.two(x)
        y = F.silu(self.gate(y)) * self.up(y) if self.gate is not None else F.gelu(self.up(y))
        return x + self.down(y)


class Model(nn.Module):
    """Tokens in, classes for every token out."""

    def __init__(self, *layers: nn.Module, tied: bool = False, pooled: bool = False) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(20, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.layers, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20, bias=False)
        self.pooled = pooled
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layers(self.table(x) + self.places))
        return self.head(x.mean(1) if self.pooled else x)


def words() -> Tensor:
    return torch.randint(0, 20, (2, LENGTH))


_MIXERS: dict[str, Any] = {
    "separate": Separate,
    "eager": lambda: Separate(eager=True),
    "grouped_queries": lambda: Separate(2),
    "one_key": lambda: Separate(1),
    "rotary": lambda: Separate(2, rotary="half"),
    "rotary_complex": lambda: Separate(rotary="complex"),
    "qk_norm": lambda: Separate(2, norm=True),
    "fused_timm": lambda: Fused("timm"),
    "fused_timm_old": lambda: Fused("timm_old"),
    "fused_split": lambda: Fused("split"),
    "fused_interleaved": lambda: Fused("interleaved"),
    "einsum": Einsum,
    "biased": Biased,
    "linear": Linear,
}
for _name, _mixer in _MIXERS.items():
    entry(f"attention_{_name}", quick=_name in ("grouped_queries", "fused_timm", "einsum", "biased"))(
        lambda m=_mixer: (Model(Layer(m()), Layer(m(), gated=True, rms=True)), words())  # type: ignore[misc]
    )


@entry("attention_cross")
def _() -> Any:
    return nn.Sequential(Cross(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)), tokens()


@entry("language_model_tied")
def _() -> Any:
    return Model(Layer(Separate(2, rotary="half"), gated=True), tied=True), words()


@entry("text_classifier_pooled")
def _() -> Any:
    return Model(Layer(Separate()), pooled=True), words()


@entry("torch_multihead_attention", quick=False)
def _() -> Any:
    class Attended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.mha = nn.Linear(WIDTH, WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.mid, self.out = nn.Linear(WIDTH, 12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            return self.out(F.relu(self.mid(x + self.mha(x, x, x)[0])))

    return Attended(), tokens()


@entry("torch_transformer_encoder", quick=False)
def _() -> Any:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True, norm_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(WIDTH, 5)), tokens()


@entry("torch_transformer", quick=False)
def _() -> Any:
    return nn.Transformer(WIDTH, HEADS, 1, 1, 24, batch_first=True), (tokens(), tokens())


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(WIDTH), nn.Linear(LENGTH, 10), nn.Linear(10, LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(self.norm(x).transpose(1, 2)))).transpose(1, 2)


@entry("mlp_mixer")
def _() -> Any:
    return Model(Layer(Mixer()), pooled=True), words()


class SpatialGate(nn.Module):
    """gMLP: one half of the channels gates the other after a projection over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.space, self.down = nn.Linear(WIDTH, 24), nn.Conv1d(LENGTH, LENGTH, 1), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.up(x)).chunk(2, -1)
        return self.down(u * self.space(v))


@entry("gmlp", quick=False)
def _() -> Any:
    return Model(SpatialGate(), pooled=True), words()


class Experts(nn.Module):
    """Each token goes to its best expert: rows picked, worked on and added back."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.batched, self.router = batched, nn.Linear(WIDTH, 3)
        if batched:
            self.up, self.down = nn.Parameter(torch.randn(3, WIDTH, 12)), nn.Parameter(torch.randn(3, 12, WIDTH))
        else:
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, WIDTH)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        share = self.router(flat).softmax(-1)
        if self.batched:
            each = torch.relu(flat.expand(3, -1, -1) @ self.up) @ self.down
            return (each * share.t()[..., None]).sum(0).view_as(x)
        best, out = share.argmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (best == i).nonzero().squeeze(1)
            out.index_add_(0, rows, expert(flat[rows]) * share[rows, i : i + 1])
        return out.view_as(x)


@entry("experts_routed")
def _() -> Any:
    return Model(Layer(Experts(False))), torch.randint(0, 20, (8, LENGTH))


@entry("experts_batched")
def _() -> Any:
    return Model(Layer(Experts(True))), words()


class Selective(nn.Module):
    """A selective state-space block with its scan written as a loop."""

    def __init__(self, inner: int = 24, state: int = 3, rank: int = 2) -> None:
        super().__init__()
        self.rank, self.state = rank, state
        self.inp, self.out = nn.Linear(WIDTH, 2 * inner), nn.Linear(inner, WIDTH)
        self.conv = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.x_proj, self.dt_proj = nn.Linear(inner, rank + 2 * state), nn.Linear(rank, inner)
        self.log_a, self.skip = nn.Parameter(torch.randn(inner, state)), nn.Parameter(torch.randn(inner))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.inp(x).chunk(2, -1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        rate, b, c = self.x_proj(x).split([self.rank, self.state, self.state], -1)
        rate = F.softplus(self.dt_proj(rate))
        state, ys = torch.zeros(x.shape[0], x.shape[2], self.state), []
        for t in range(x.shape[1]):
            keep = torch.exp(-rate[:, t, :, None] * self.log_a.exp())
            state = keep * state + (rate[:, t] * x[:, t])[..., None] * b[:, t, None]
            ys.append((state * c[:, t, None]).sum(-1))
        return self.out((torch.stack(ys, 1) + self.skip * x) * F.silu(gate))


@entry("state_space")
def _() -> Any:
    return Model(Layer(Selective())), words()


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, by product of the weights or of the activations."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged, self.base = merged, nn.Linear(WIDTH, 12)
        self.a, self.b = nn.Parameter(torch.randn(4, WIDTH)), nn.Parameter(torch.randn(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


@entry("lora")
def _() -> Any:
    return nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), Adapted(False), nn.ReLU(), nn.Linear(12, 5)), torch.randn(3, 8)


@entry("lora_merged")
def _() -> Any:
    return nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), Adapted(True), nn.ReLU(), nn.Linear(12, 5)), torch.randn(3, 8)
