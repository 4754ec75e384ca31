"""What a rank does not hold cannot reach what it computes: shown with numbers, on plain models.

The rows of all units that a rank does not own are set to zero; then everything that it does not
hold is filled with garbage. If the output changes, some unit needs what is said to be apart.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import watched_models as models
from shardproof.units import CutDim, Shared
from shardproof.watching import Family, choose, families, watch

HIDDEN: dict[str, Callable[[], nn.Module]] = {
    "interleaved": models.Interleaved,
    "grouped": models.Grouped,
    "grouped and fused": lambda: models.Grouped(is_fused=True),
    "gated": models.Gated,
    "gated heads": models.GatedHeads,
    "gated, interleaved": lambda: models.Gated(is_interleaved=True),
    "scan": models.Scan,
    "experts": models.Experts,
    "adapters": models.AdaptedFeedForward,
    "latent": models.Latent,
    "alibi": models.Alibi,
    "encoder layer": lambda: nn.TransformerEncoderLayer(12, 3, 20, batch_first=True),
}


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).clone()


def fill(parameter: Tensor, dim: int, indices: np.ndarray, value: float | None) -> None:
    """Set some indices to a value, or to garbage."""
    places = torch.from_numpy(indices)
    with torch.no_grad():
        part = parameter.index_select(dim, places)
        new = torch.full_like(part, value) if value is not None else torch.randn_like(part)
        parameter.index_copy_(dim, places, new)


def rows_of(family: Family) -> set[tuple[str | None, int | None]]:
    return {(event.parameter, event.dim) for event in family.events if event.what == "reduce"}


def change(model: nn.Module, x: Tensor, family: Family, degree: int, rank: int) -> float:
    """How far garbage in what a rank does not hold moves what it computes."""
    parameters = dict(model.named_parameters())
    rows = rows_of(family)
    assert rows
    assert rows <= set(family.dims)
    shared = Shared(family.units, 8, degree)
    cuts = {key: CutDim(shared, blocks) for key, blocks in family.dims.items()}
    every = {key: np.arange(cut.size) for key, cut in cuts.items()}
    for key in rows:
        fill(parameters[key[0]], key[1], np.setdiff1d(every[key], cuts[key].owned(rank)), 0.0)
    before = run(model, x)
    for key in set(family.dims) - rows:
        fill(parameters[key[0]], key[1], np.setdiff1d(every[key], cuts[key].held(rank)), None)
    return float((run(model, x) - before).abs().max())


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("degree", [2, 3])
def test_what_a_rank_does_not_hold_does_not_matter(name: str, degree: int) -> None:
    torch.manual_seed(3)
    x = torch.rand(2, 5, 12, dtype=torch.float64)
    model = HIDDEN[name]().double().eval()
    watched = watch(model, (x,))
    cut = [
        family
        for family in choose(families(watched), watched, enough=0.0).families
        if family.kind == "pair"
    ]
    assert cut
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    for family in cut:
        for rank in range(degree):
            assert change(model, x, family, degree, rank) < 1e-12, (family.name, rank)
            model.load_state_dict(kept)


def test_a_unit_that_is_torn_apart_is_noticed() -> None:
    torch.manual_seed(3)
    x = torch.rand(2, 5, 12, dtype=torch.float64)
    model = models.Interleaved().double()
    watched = watch(model, (x,))
    family = choose(families(watched), watched).families[0]
    wrong = Family(
        family.name,
        family.units,
        {**family.dims, ("qkv.weight", 0): family.dims["dense.weight", 1] * 3},
        (),
        "pair",
        family.events,
    )
    assert change(model, x, wrong, 3, 0) > 1e-3
