"""Mistakes of language models: the vocabulary, key-value heads, tied weights, dropout."""

from shardproof.mistakes import language_model
from shardproof.mistakes.edit import Edit
from shardproof.mistakes.mistake import TORCH, Finding, Mistake
from shardproof.numerics.attention_math import HeadDropout
from shardproof.ops import embedding, head_split, vocabulary
from shardproof.ops.head_split import HeadSplit
from shardproof.ops.vocabulary_blocks import VocabularyBlocks

OF_LANGUAGE_MODELS = (
    Mistake(
        "last-tokens-of-nobody",
        "Every rank takes 67 // 2 rows of the vocabulary, and the last row is nobody's.",
        Edit(
            embedding._places,
            "is_elsewhere = (flat < owned.start) | (flat >= owned.stop)",
            "rows = split.cut.size // split.axis.size\n"
            "is_elsewhere = (flat < owned.start) | (flat >= min(owned.stop, "
            "rows * split.axis.size))",
        ),
        language_model.WORDS,
        "67 // 2 is 33, and 2 times 33 is 66. Every rank takes the last token for another rank's, "
        "and answers with zeros. A text without that token shows nothing. Cut the vocabulary into "
        "uneven parts, or pad it.",
        Finding("logits"),
        sighting="transformers (issue 37051)",
    ),
    Mistake(
        "softmax-over-own-vocabulary",
        "Each rank makes the softmax over its own part of the vocabulary.",
        Edit(
            vocabulary._VocabCrossEntropy.forward,
            "norm = vocabulary.normalizer(blocks)",
            "own = vocabulary.cut.owned(vocabulary.split.axis.rank)\n"
            "norm = vocabulary.normalizer(blocks[list(own)])",
        ),
        language_model.WORDS,
        "The sum of exponentials in a softmax runs over all tokens. A rank has the logits of its "
        "own tokens, so that the ranks must share their largest logit and their sums. If each uses "
        "its own, every rank has another loss, and all of them are too small, even below zero.",
        Finding("loss", says="replicas differ at degree 2: rank 1 differs from rank 0"),
    ),
    Mistake(
        "exponentials-of-different-maxima",
        "Sums of exponentials are added although each was made with another maximum.",
        Edit(
            VocabularyBlocks.normalizer,
            "total = self._sum_blocks(blocks[:, SUM] * (blocks[:, TOP] - top).exp_())",
            "total = self._sum_blocks(blocks[:, SUM].clone())",
        ),
        language_model.WORDS,
        "A stable softmax subtracts the largest logit before it takes exponentials. Each part of "
        "the vocabulary has subtracted its own largest, so that its sum must be multiplied by "
        "exp(own largest - largest of all) first. Here the parts are the leaves, so that every "
        "degree is wrong in the same way.",
        Finding("loss", TORCH, ()),
    ),
    Mistake(
        "key-value-gradients-not-summed",
        "Ranks that share a key-value head do not add up their gradients of it.",
        Edit(
            HeadSplit.key_gradients,
            "self.arithmetic.add((0, group), shared.get(key) or self._of_queries(key, partials))",
            "sum(self._of_queries(key, partials).values())",
        ),
        language_model.WORDS,
        "One key-value head serves several query heads. If these lie on several ranks, each of the "
        "ranks holds a copy of the key-value head, and finds the gradient that comes from its own "
        "query heads. The copies must get the sum. Otherwise each of them learns something else.",
        Finding(
            "attention.value.weight.grad",
            says="copies differ at degree 2: leaf 0 of rank 1 differs from that of rank 0",
        ),
    ),
    Mistake(
        "wrong-key-value-head",
        "Query heads are counted from the first one of the rank and not from the first of all.",
        Edit(
            head_split.serving_heads,
            "return tuple(head // heads.group - held.start for head in owned)",
            "return tuple(place // heads.group for place in range(len(owned)))",
        ),
        language_model.GROUPS,
        "Query head 3 of 8 belongs to the first group of four. Rank 1 of three owns the query "
        "heads 3, 4 and 5 and counts them as 0, 1 and 2, so that it takes the first key-value head "
        "for all three. At degree 2 each rank begins with a whole group, and nothing is wrong.",
        Finding("logits", degrees=(1, 3)),
        degrees=(1, 2, 3),
        hidden_at=(1, 2),
    ),
    Mistake(
        "attention-dropout-counted-from-zero",
        "Every rank draws the dropout masks of its heads as if its first head were head 0.",
        Edit(
            HeadDropout.keep,
            "for place, head in enumerate(heads):",
            "for place, head in enumerate(range(len(heads))):",
        ),
        language_model.DROPPING,
        "The masks of different heads must be different. With the same seed on every rank, and "
        "heads counted from 0, the first head of each rank gets the mask of head 0. The model "
        "trains, with less noise than it should have, and with other noise at every degree.",
        Finding("logits", agrees=True),
    ),
    Mistake(
        "tied-gradient-added-twice",
        "The gradients of the two uses of a tied weight are added, and autograd has added them.",
        Edit(
            language_model.add_uses,
            "if head.weight is not embedding.weight:\n"
            "    embedding.weight.grad.add_(head.weight.grad)",
            "embedding.weight.grad.add_(head.weight.grad)",
        ),
        language_model.TIED,
        "Where the embedding and the output head lie on different pipeline stages, each has its "
        "own copy of the tied weight, and the two gradients must be added. On one stage they are "
        "one parameter, whose gradient autograd has added up already. Adding it to itself doubles "
        "it, at every degree alike.",
        Finding("embedding.weight.grad", TORCH, ()),
    ),
)
