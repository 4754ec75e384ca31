"""Mistakes that people make in tensor parallelism: each planted, seen, and named by the prover."""

from difflib import get_close_matches

from shardproof.errors import UsageError
from shardproof.mistakes.edit import Edit as Edit
from shardproof.mistakes.mistake import Finding as Finding
from shardproof.mistakes.mistake import Mistake as Mistake
from shardproof.mistakes.of_language_models import OF_LANGUAGE_MODELS
from shardproof.mistakes.of_sums import OF_SUMS
from shardproof.mistakes.of_training import OF_TRAINING
from shardproof.mistakes.of_weights import OF_WEIGHTS
from shardproof.wording import VALUE, short_repr

CHAPTERS: tuple[tuple[str, tuple[Mistake, ...]], ...] = (
    ("Sums between ranks", OF_SUMS),
    ("Weights and their parts", OF_WEIGHTS),
    ("Vocabulary, heads and tied weights", OF_LANGUAGE_MODELS),
    ("Around the layers", OF_TRAINING),
)


def all_mistakes() -> tuple[Mistake, ...]:
    """Every mistake, chapter by chapter."""
    return tuple(mistake for _, mistakes in CHAPTERS for mistake in mistakes)


def find_mistake(name: str) -> Mistake:
    """The mistake of a name.

    Args:
        name: as `shardproof break --list` has it.
    Raises:
        UsageError: there is none; names the near ones.
    """
    mistakes = {mistake.name: mistake for mistake in all_mistakes()}
    if name in mistakes:
        return mistakes[name]
    near = get_close_matches(name[:VALUE], mistakes, n=3, cutoff=0.4)
    hint = f"Near names: {', '.join(near)}. " if near else ""
    raise UsageError(
        f"there is no mistake {short_repr(name)}. {hint}See all: shardproof break --list."
    )
