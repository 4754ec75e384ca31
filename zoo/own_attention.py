"""Models of one's own, in the way in which people write them: kinds of attention."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.own_blocks import HEADS, INNER, WIDTH, WORDS


class CausalSelfAttention(nn.Module):
    """nanoGPT's: one projection for queries, keys and values; `flash` or by hand."""

    bias: Tensor

    def __init__(self, n_embd: int, n_head: int, dropout: float, block_size: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head = n_head
        self.n_embd = n_embd
        self.dropout = dropout
        self.flash = block_size <= 0
        if not self.flash:
            mask = torch.tril(torch.ones(block_size, block_size))
            self.register_buffer("bias", mask.view(1, 1, block_size, block_size))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) -> the same."""
        B, T, C = x.size()  # noqa: N806
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0,
                is_causal=True,
            )  # fmt: skip
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = F.softmax(att, dim=-1)
            att = self.attn_dropout(att)
            y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """nanoGPT's feed-forward."""

    def __init__(self, n_embd: int, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) -> the same."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """nanoGPT's layer."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, block_size: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, dropout, block_size)
        self.mlp = MLP(n_embd, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) -> the same."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """nanoGPT: the head is the table of words, and forward returns scores and loss."""

    transformer: Any

    def __init__(self, dropout: float = 0.1, block_size: int = 64, flash: bool = True) -> None:
        super().__init__()
        layers = [Block(WIDTH, HEADS, dropout, 0 if flash else block_size) for _ in range(2)]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(WORDS, WIDTH),
                "wpe": nn.Embedding(block_size, WIDTH),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(layers),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, length) twice -> scores (batch, length, words), and the loss."""
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


class Grouped(nn.Module):
    """Six query heads share two heads of keys and values, with rotated places."""

    def __init__(self, n_heads: int = HEADS, n_kv_heads: int = 2) -> None:
        super().__init__()
        self.head_dim = WIDTH // n_heads
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.tok_embeddings = nn.Embedding(WORDS, WIDTH)
        self.wq = nn.Linear(WIDTH, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(WIDTH, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(WIDTH, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, WIDTH, bias=False)
        self.output = nn.Linear(WIDTH, WORDS, bias=False)

    def rotated(self, x: Tensor) -> Tensor:
        """(batch, length, heads, size), each pair of halves turned by its place."""
        half = self.head_dim // 2
        speeds = 1.0 / 10000 ** (torch.arange(half, device=x.device, dtype=x.dtype) / half)
        angles = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=x.dtype), speeds)
        cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
        one, two = x[..., :half], x[..., half:]
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)

    def forward(self, idx: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, words)."""
        h = self.tok_embeddings(idx)
        bsz, seqlen, _ = h.shape
        xq = self.rotated(self.wq(h).view(bsz, seqlen, self.n_heads, self.head_dim))
        xk = self.rotated(self.wk(h).view(bsz, seqlen, self.n_kv_heads, self.head_dim))
        xv = self.wv(h).view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        keys = torch.repeat_interleave(xk, self.n_heads // self.n_kv_heads, dim=2)
        values = torch.repeat_interleave(xv, self.n_heads // self.n_kv_heads, dim=2)
        xq, keys, values = (each.transpose(1, 2) for each in (xq, keys, values))
        y = F.scaled_dot_product_attention(xq, keys, values, is_causal=True)
        h = h + self.wo(y.transpose(1, 2).contiguous().view(bsz, seqlen, -1))
        return self.output(h)


class Latent(nn.Module):
    """Keys and values of all heads are made from a short latent vector."""

    def __init__(self, rank: int = 16, nope: int = 8, rope: int = 4) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.q_a, self.q_norm = nn.Linear(WIDTH, 24, bias=False), nn.RMSNorm(24)
        self.q_b = nn.Linear(24, HEADS * (nope + rope), bias=False)
        self.kv_a, self.kv_norm = nn.Linear(WIDTH, rank + rope, bias=False), nn.RMSNorm(rank)
        self.kv_b = nn.Linear(rank, HEADS * (nope + nope), bias=False)
        self.o_proj = nn.Linear(HEADS * nope, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.rank, self.nope, self.rope = rank, nope, rope

    def forward(self, idx: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, words)."""
        x = self.wte(idx)
        B, T, _ = x.shape  # noqa: N806
        q = self.q_b(self.q_norm(self.q_a(x))).view(B, T, HEADS, -1).transpose(1, 2)
        latent, k_rope = self.kv_a(x).split([self.rank, self.rope], dim=-1)
        kv = self.kv_b(self.kv_norm(latent)).view(B, T, HEADS, -1).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.nope], dim=-1)
        k_rope = k_rope.view(B, 1, T, self.rope).expand(-1, HEADS, -1, -1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.o_proj(y.transpose(1, 2).reshape(B, T, -1)))


class Cross(nn.Module):
    """Words attend to what another model saw."""

    def __init__(self, seen: int = 20) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_kv = nn.Linear(seen, 2 * WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, idx: Tensor, context: Tensor) -> Tensor:
        """(batch, length), (batch, seen, features) -> (batch, length, words)."""
        x = self.wte(idx)
        q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (q, k, v))
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("bhij,bhjd->bhid", sim.softmax(dim=-1), v)
        return self.head(x + self.to_out(out.transpose(1, 2).flatten(2)))


class TorchEncoder(nn.Module):
    """torch's own encoder between words and scores."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, dropout=0.1, batch_first=True)
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, idx: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, words)."""
        return self.head(self.encoder(self.wte(idx)))


class TorchDecoder(nn.Module):
    """torch's own decoder, with what it attends to."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, INNER, dropout=0.1, batch_first=True)
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, idx: Tensor, memory: Tensor) -> Tensor:
        """(batch, length), (batch, seen, width) -> (batch, length, words)."""
        mask = nn.Transformer.generate_square_subsequent_mask(
            idx.size(1), device=idx.device, dtype=memory.dtype
        )
        return self.head(self.decoder(self.wte(idx), memory, tgt_mask=mask, tgt_is_causal=True))
