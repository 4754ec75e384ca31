"""Small models of one's own, each with what is hard to see in it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FusedAttention(nn.Module):
    """As nanoGPT has it: q, k and v in one weight, the number of heads in the code."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.width = heads, width

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        parts = self.c_attn(x).split(self.width, dim=2)
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in parts
        )
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        mask = torch.tril(torch.ones(length, length, device=x.device)) == 0
        scores = scores.masked_fill(mask, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class NanoGPT(nn.Module):
    """Tied head, learned positions, layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 12), nn.Embedding(8, 12)
        self.ln_1, self.ln_2, self.ln_f = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.attn = FusedAttention()
        self.c_fc, self.c_out = nn.Linear(12, 20), nn.Linear(20, 12)
        self.drop = nn.Dropout(0.1)
        self.lm_head = nn.Linear(12, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device)))
        x = x + self.attn(self.ln_1(x))
        x = x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))
        logits = self.lm_head(self.ln_f(x))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return logits, loss


class Interleaved(nn.Module):
    """As GPT-NeoX has it: the fused weight lies [head, (q, k, v), feature]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dense = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, -1, 3, 12).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(y.transpose(1, 2).reshape(2, -1, 12))


class Grouped(nn.Module):
    """6 query heads, 2 key-value heads, rotary positions; one weight where `is_fused`."""

    def __init__(self, is_fused: bool = False) -> None:
        super().__init__()
        self.is_fused = is_fused
        if is_fused:
            self.qkv = nn.Linear(12, 40, bias=False)  # for each group 3 queries, a key, a value
        else:
            self.q, self.k, self.v = (nn.Linear(12, n, bias=False) for n in (24, 8, 8))
        self.o = nn.Linear(24, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.is_fused:
            fused = self.qkv(x).view(batch, length, 2, 5, 4)
            q, k, v = fused[:, :, :, :-2], fused[:, :, :, [-2]], fused[:, :, :, [-1]]
            q = q.flatten(2, 3)
            k, v = (each.flatten(2, 3) for each in (k, v))
        else:
            q = self.q(x).view(batch, length, 6, 4)
            k, v = (each(x).view(batch, length, 2, 4) for each in (self.k, self.v))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        q, k = self.rotated(q), self.rotated(k)
        k, v = (each.repeat_interleave(3, dim=1) for each in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(batch, length, 24))

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2], device=x.device)[:, None] * torch.ones(4, device=x.device)
        half = torch.cat([-x[..., 2:], x[..., :2]], dim=-1)
        return x * angles.cos() + half * angles.sin()


class Parallel(nn.Module):
    """Blocks of two heads in a view (blocks, parts, features), as CodeGen has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = self.qkv(x).reshape(batch, length, 2, 24)  # two blocks of two heads of 4
        q, k, v = (
            part.reshape(batch, length, 2, 2, 4).reshape(batch, length, 4, 4).transpose(1, 2)
            for part in split.split(8, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, 16))


class Gated(nn.Module):
    """A gated feed-forward: `chunk`, or even and odd columns."""

    def __init__(self, is_interleaved: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20, bias=False), nn.Linear(10, 12, bias=False)
        self.is_interleaved = is_interleaved

    def forward(self, x: Tensor) -> Tensor:
        both = self.up(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.is_interleaved else both.chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Scan(nn.Module):
    """A Mamba-like block: depthwise convolution, a scan in a loop, fused projections."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(12, 36, bias=False)
        self.conv = nn.Conv1d(18, 18, 3, groups=18, padding=2)
        self.x_proj, self.dt_proj = nn.Linear(18, 8, bias=False), nn.Linear(2, 18)
        self.a_log, self.skip = nn.Parameter(torch.rand(18, 3)), nn.Parameter(torch.ones(18))
        self.out_proj = nn.Linear(18, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., :length]).transpose(1, 2)
        dt, b, c = self.x_proj(x).split([2, 3, 3], dim=-1)
        dt, a = F.softplus(self.dt_proj(dt)), -torch.exp(self.a_log)
        state, found = torch.zeros(batch, 18, 3, device=x.device), []
        for t in range(length):
            state = torch.exp(dt[:, t, :, None] * a) * state
            state = state + dt[:, t, :, None] * b[:, t, None, :] * x[:, t, :, None]
            found.append((state * c[:, t, None, :]).sum(-1))
        return self.out_proj((torch.stack(found, 1) + x * self.skip) * F.silu(z))


class Experts(nn.Module):
    """A mixture of experts as a loop that looks at the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(12, 3, bias=False)
        self.up = nn.ModuleList([nn.Linear(12, 30) for _ in range(3)])
        self.down = nn.ModuleList([nn.Linear(30, 12) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(2, dim=-1)
        total = torch.zeros_like(flat)
        mask = F.one_hot(chosen, 3).permute(2, 1, 0)
        for number in range(3):
            slot, token = torch.where(mask[number])
            if len(token) == 0:
                continue
            y = self.down[number](F.relu(self.up[number](flat[token])))
            total.index_add_(0, token, y * weights[token, slot, None])
        return total.view_as(x)


class Patches(nn.Module):
    """A vision transformer: patch convolution, class token, positions, `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, stride=4)
        self.cls, self.pos = nn.Parameter(torch.rand(1, 1, 12)), nn.Parameter(torch.rand(1, 5, 12))
        self.norm, self.attn = nn.LayerNorm(12), nn.MultiheadAttention(12, 3, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos
        y = self.norm(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.head(x[:, 0])


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))


class AdaptedFeedForward(nn.Module):
    """Column and row, both with adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Adapted(nn.Linear(12, 20)), Adapted(nn.Linear(20, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Latent(nn.Module):
    """Latent attention: queries and values from small latents, one rotary key for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_a, self.q_norm, self.q_b = nn.Linear(12, 5), nn.RMSNorm(5), nn.Linear(5, 18)
        self.kv_a, self.kv_norm, self.kv_b = nn.Linear(12, 6), nn.RMSNorm(4), nn.Linear(4, 24)
        self.o = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_b(self.q_norm(self.q_a(x))).view(batch, length, 3, 6).transpose(1, 2)
        latent, rotary = self.kv_a(x).split([4, 2], dim=-1)
        kv = self.kv_b(self.kv_norm(latent)).view(batch, length, 3, 8).transpose(1, 2)
        k, v = kv.split([4, 4], dim=-1)
        k = torch.cat([k, rotary[:, None].expand(batch, 3, length, 2)], dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(batch, length, 12))


class Alibi(nn.Module):
    """Slopes by head, and one key-value head for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 20, bias=False), nn.Linear(12, 12, bias=False)
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125]))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).split([12, 4, 4], dim=-1)
        q = q.view(batch, length, 3, 4).transpose(1, 2)
        k, v = k[:, None], v[:, None]
        bias = self.slopes.view(1, 3, 1, 1) * torch.arange(length, device=x.device)
        y = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, 12))


class NormedHeads(nn.Module):
    """A norm over the features of all query heads, before they are heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12, bias=False) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        q, k, v = (e.view(2, -1, 3, 4).transpose(1, 2) for e in (q, self.k(x), self.v(x)))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(2, -1, 12))


class GatedHeads(Grouped):
    """The features that attention returns are each scaled by a gate of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(12, 24, bias=False)
        self.last = nn.Linear(24, 12, bias=False)
        self.o = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x) * torch.sigmoid(self.gate(x)))
