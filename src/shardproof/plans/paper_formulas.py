"""Costs of a GPT model on paper: the formulas of two papers on Megatron-LM.

They hold for the layers of GPT-2 and GPT-3 (feed-forward of 4h, dropout, as many key-value heads as
heads) with activations of 16 bits. Of another model they are an estimate. Nothing here is measured.

Sources: Narayanan et al. 2021, arXiv 2104.04473, equations 2 and 3. Korthikanti et al. 2022, arXiv
2205.05198, table 2 and equations 7 and 8.
"""

from dataclasses import dataclass
from typing import Any, Literal

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class GptSize:
    """The numbers of a GPT model that the formulas need.

    Attributes:
        hidden: features of a token, h.
        heads: attention heads of a layer, a.
        layers: number of layers, l or L.
        vocabulary: number of tokens, V.
    """

    hidden: int
    heads: int
    layers: int
    vocabulary: int

    def parameters(self, length: int) -> int:
        """12lh^2 (1 + 13/12h + (V + s)/12lh): equation 2 of Narayanan et al.

        Args:
            length: number of positions, s.
        """
        h, layers = self.hidden, self.layers
        return 12 * layers * h**2 + 13 * layers * h + (self.vocabulary + length) * h

    def flops(self, rows: int, length: int) -> int:
        """72BLsh^2 (1 + s/6h + V/12hL): equation 7 of Korthikanti et al., forward and backward.

        Args:
            rows: of the batch, B.
            length: tokens of a row, s.
        """
        return 3 * self._forward(rows, length)

    def flops_with(self, recompute: Recompute, rows: int, length: int) -> int:
        """The flops with what is computed again in backward.

        "selective" is 72BLsh^2 (1 + s/3h + V/12hL), equation 8 of Korthikanti et al. as printed: it
        adds three times the two products of the attention, which its text counts once. "full"
        computes each layer again: 96Bslh^2 (1 + s/6h + V/16lh), equation 3 of Narayanan et al.

        Args:
            recompute: what is computed again.
            rows: of the batch, B.
            length: tokens of a row, s.
        """
        logits = 2 * rows * length * self.hidden * self.vocabulary
        again = {
            "none": 0,
            "selective": 12 * rows * length**2 * self.hidden * self.layers,
            "full": self._forward(rows, length) - logits,
        }
        return self.flops(rows, length) + again[recompute]

    def _forward(self, rows: int, length: int) -> int:
        h, tokens = self.hidden, rows * length
        layer = 24 * tokens * h**2 + 4 * tokens * length * h
        return self.layers * layer + 2 * tokens * h * self.vocabulary

    def activation_bytes(
        self,
        rows: int,
        length: int,
        *,
        tp: int = 1,
        sequence_parallel: bool = False,
        recompute: Recompute = "none",
    ) -> int:
        """Bytes that one layer keeps on a rank for backward: table 2 of Korthikanti et al.

        sbh(34 + 5as/h) on one rank, sbh(10 + 24/t + 5as/ht) with tensor parallelism, and
        sbh(34 + 5as/h)/t if sequence parallelism cuts the rest too. "selective" leaves out the
        summand with a, and "full" keeps 2sbh.

        Args:
            rows: of one pass, b.
            length: tokens of a row, s.
            tp: number of ranks that share a layer, t.
            sequence_parallel: norms, dropout and inputs are cut along the tokens too.
            recompute: what backward computes again.
        """
        elements = rows * length * self.hidden
        if recompute == "full":
            return 2 * elements
        whole = 0 if sequence_parallel else 10 * elements
        attention = 5 * self.heads * rows * length**2 if recompute == "none" else 0
        return whole + (34 * elements - whole + attention) // tp


def gpt_size(config: Any) -> GptSize | None:
    """The size that a config of transformers gives; None if it lacks a number.

    Args:
        config: of a model.
    """
    text = config.get_text_config()
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    numbers = [getattr(text, name, None) for name in names]
    whole = [number for number in numbers if isinstance(number, int)]
    return GptSize(*whole) if len(whole) == len(names) else None
