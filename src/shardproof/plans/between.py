"""Forms of functions of torch, for code between layers that are cut by names."""

from torch import nn

from shardproof.cut.calls import Calling
from shardproof.cut.spec import Region
from shardproof.plans.against_forward import Comparison


def compute_by_forms(model: nn.Module, found: Comparison, region: Region) -> None:
    """Let code between cut layers compute functions of torch so that no cut changes their bits.

    Args:
        model: cut by names.
        found: by a forward.
        region: of the model.
    """
    modules = dict(model.named_modules())
    calls, draws = (
        {name for name in names if name in modules and not _is_of(modules[name], *_SETTLED)}
        for names in (found.calls | found.draws, found.draws)
    )
    inside = {  # a layer of ours must not be seen by the `Calls` of the module around it
        each
        for each, module in modules.items()
        if each not in calls
        and (_is_of(module, "shardproof.") or any(module.children()))
        and any(each.startswith(f"{name}." if name else "") and each for name in calls)
    }
    made = {name: Calling(region, name, calls=True, draws=name in draws) for name in calls}
    made |= {name: Calling(region, name, calls=False, draws=False) for name in inside}
    for name, calling in made.items():
        calling.hook(modules[name])


# Of whose code nothing needs a form: what of torch's modules did was replaced, or refused.
_SETTLED = ("shardproof.", "torch.nn.")


def _is_of(module: nn.Module, *packages: str) -> bool:
    return type(module).__module__.startswith(packages)
