"""The names of the classes in the four lists of transformers that the zoo goes through."""

from transformers.models.auto import modeling_auto

from zoo import own

_MAPS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}

LISTS = (*_MAPS, "own")


def names(which: str) -> list[str]:
    """Names of the classes of the list `which`, each once, in alphabetical order.

    The list "own" has the models of `zoo.own`.

    Where the list has several classes for one type of model, all of them are here.
    """
    if which == "own":
        return list(own.NAMES)
    found: set[str] = set()
    for entry in _MAPS[which].values():
        found.update([entry] if isinstance(entry, str) else entry)
    return sorted(found)


def lists_of(name: str) -> list[str]:
    """The lists that have the class `name`. A class can stand in two."""
    return [which for which in LISTS if name in names(which)]
