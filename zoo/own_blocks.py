"""Models of one's own, in the way in which people write them: convolutions, scans, experts.

Nothing here knows of parallelism. Sizes: 48 features, 6 heads, 100 inner features, 251 words.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, INNER, WORDS = 48, 6, 100, 251


class ViT(nn.Module):
    """A vision transformer: patches by a convolution, a class token, learned places."""

    def __init__(self, image: int = 32, patch: int = 8, classes: int = 7) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(ViTBlock() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 3, side, side) -> (batch, classes)."""
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ViTBlock(nn.Module):
    """Attention with one projection for all three, as timm has it, and a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))
        self.num_heads = HEADS

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) -> the same."""
        B, N, C = x.shape  # noqa: N806
        qkv = self.qkv(self.norm1(x)).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


class Gated(nn.Module):
    """A feed-forward whose gate and value are the two halves of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        self.w12 = nn.Linear(WIDTH, 2 * INNER)
        self.w3 = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, words)."""
        x = self.wte(idx)
        x1, x2 = self.w12(self.norm(x)).chunk(2, dim=-1)
        return self.head(x + self.w3(F.silu(x1) * x2))


class MambaBlock(nn.Module):
    """A selective scan, step by step, behind a depthwise convolution."""

    def __init__(self, state: int = 4, rank: int = 3) -> None:
        super().__init__()
        inner = 2 * WIDTH
        self.norm = nn.LayerNorm(WIDTH)
        self.in_proj = nn.Linear(WIDTH, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, state + 1.0)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, WIDTH, bias=False)
        self.d_state, self.dt_rank = state, rank

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, length, width) -> the same."""
        x, z = self.in_proj(self.norm(hidden)).chunk(2, dim=-1)
        length = x.shape[1]
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :length]).transpose(1, 2)
        sizes = [self.dt_rank, self.d_state, self.d_state]
        dt, B, C = torch.split(self.x_proj(x), sizes, dim=-1)  # noqa: N806
        dt = F.softplus(self.dt_proj(dt))
        A = -torch.exp(self.A_log)  # noqa: N806
        h, ys = x.new_zeros(x.shape[0], x.shape[2], self.d_state), []
        for t in range(length):
            dA = torch.exp(dt[:, t, :, None] * A)  # noqa: N806
            h = dA * h + (dt[:, t] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(1)
            ys.append((h * C[:, t].unsqueeze(1)).sum(-1))
        y = torch.stack(ys, dim=1) + x * self.D
        return hidden + self.out_proj(y * F.silu(z))


class Mamba(nn.Module):
    """Two blocks with a scan between words and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(MambaBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, words)."""
        x = self.wte(idx)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Expert(nn.Module):
    """A gated feed-forward."""

    def __init__(self, inner: int = 20) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(WIDTH, inner, bias=False), nn.Linear(WIDTH, inner, bias=False)
        self.w2 = nn.Linear(inner, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, width) -> the same."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    """A mixture of experts as a loop: each takes the tokens that the router sends it."""

    def __init__(self, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.top_k = chosen

    def forward(self, idx: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, words)."""
        x = self.wte(idx)
        flat = x.view(-1, x.shape[-1])
        weights, selected = torch.topk(self.gate(flat).softmax(dim=-1), self.top_k)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        results = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, nth = torch.where(selected == i)
            results[token] += weights[token, nth, None] * expert(flat[token])
        return self.head(x + results.view_as(x))


class LoRALinear(nn.Module):
    """A frozen linear layer with two trained thin ones beside it."""

    def __init__(self, base: nn.Linear, r: int = 4, alpha: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features) / math.sqrt(base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        """(*, in) -> (*, out)."""
        return self.base(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


class LoRA(nn.Module):
    """A feed-forward whose linear layers are adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, WIDTH).requires_grad_(False)
        self.up = LoRALinear(nn.Linear(WIDTH, INNER))
        self.down = LoRALinear(nn.Linear(INNER, WIDTH))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, idx: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, words)."""
        x = self.wte(idx)
        return self.head(x + self.down(F.relu(self.up(x))))


class ConvNet(nn.Module):
    """Convolutions with batch norm, pooling, and two linear layers."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.fc1, self.fc2 = nn.Linear(20 * 8 * 8, INNER), nn.Linear(INNER, classes)
        self.drop = nn.Dropout(0.1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 3, 32, 32) -> (batch, classes)."""
        x = torch.flatten(self.features(pixels), 1)
        return self.fc2(self.drop(F.relu(self.fc1(x))))
