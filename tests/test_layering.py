"""The house, floor by floor: a module may import only what stands on a floor below its own.

Reading FLOORS is reading the architecture. A new file needs a place here; a file that cannot be
given one wants to be two files. Modules of one floor do not know each other. Imports inside
functions and under TYPE_CHECKING count too.
"""

import ast
import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "shardproof"

# Bottom up. `x.__init__` is the package file of `x`; "" before the dot is shardproof itself.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "wording"),
    # What others wrote: numbers, variables of the environment, files.
    ("operands", "quantities"),
    ("environment", "files"),
    ("objects",),
    ("autograd", "checking", "core", "extras", "leaves", "runs", "telling", "tree"),
    ("heads", "observing", "scheme", "timeout", "units"),
    ("operators",),
    ("block_layout",),
    # One forward of any module, and what of it can be cut apart: labels, rules, families.
    ("watching.atoms", "watching.kinds"),
    ("watching.record",),
    ("watching.factors",),
    ("watching.labelled", "watching.needs"),
    ("watching.boundaries", "watching.moving", "watching.rules"),
    ("watching.contractions", "watching.lookups", "watching.norms"),
    ("watching.running",),
    ("watching.forward",),
    ("watching.family",),
    ("watching.choice",),
    ("watching.__init__",),
    # Bytes between ranks.
    ("transport.ledger", "transport.notes"),
    ("transport.base",),
    ("transport.agreement",),
    ("transport.portable", "transport.rendezvous", "transport.stream"),
    ("transport.incore", "transport.segment"),
    (
        "transport.distributed",
        "transport.rehearsed",
        "transport.shared",
        "transport.solo",
        "transport.threads",
    ),
    ("transport.disabled",),
    ("transport.choose",),
    ("transport.__init__",),
    ("axis",),
    # Arithmetic on plain tensors.
    ("numerics.precision",),
    ("numerics.mode", "numerics.elementwise", "numerics.sums", "numerics.random"),
    ("numerics.bent", "numerics.products"),
    ("numerics.matmul",),
    (
        "numerics.headwise",
        "numerics.holding",
        "numerics.indexing",
        "numerics.joined",
        "numerics.reducing",
    ),
    ("numerics.attending", "numerics.broadcasting"),
    ("numerics.activating", "numerics.contracting", "numerics.headed", "numerics.powers"),
    (
        "numerics.convolving",
        "numerics.einsum",
        "numerics.lengths",
        "numerics.pooling",
        "numerics.rowwise",
    ),
    ("numerics.arithmetic", "numerics.channelwise", "numerics.entropy"),
    ("numerics.forms",),
    ("numerics.__init__",),
    # Collectives, then what is built from both.
    ("comm.check", "comm.plans"),
    ("comm.reporting",),
    ("comm.gathers", "comm.started"),
    ("comm.split", "comm.sums", "recut"),
    ("comm.runs_of_indices",),
    ("comm.__init__", "comm.differentiable"),
    (
        "ops.classes",
        "ops.head_split",
        "ops.linear_steps",
        "ops.rows",
        "ops.sampling",
        "ops.vocabulary_blocks",
    ),
    ("ops.embedding", "ops.linear_products", "ops.losses"),
    ("ops.attention", "ops.linear", "ops.unit_split", "ops.vocabulary"),
    ("ops.shared",),
    ("ops.unit_moves", "ops.unit_products"),
    (
        "ops.unit_rows",
        "ops.unit_lookup",
        "ops.unit_sums",
        "ops.entering",
        "ops.serving",
    ),
    ("ops.unit_linear",),
    ("ops.unit_contract",),
    ("ops.unit_ops",),
    ("ops.dropout", "ops.rms"),
    ("ops.cut_norms",),
    ("ops.norms",),
    ("functional", "ops.__init__"),
    # What of torch would take a shard for the whole.
    ("layers.registry", "layers.replace"),
    ("layers.step_guard",),
    ("layers.data_parallel", "layers.refuse", "layers.scaling", "layers.state_guard"),
    ("layers.filling", "layers.guard"),
    ("layers.base",),
    ("layers.cut_module", "layers.dropout", "layers.formula"),
    ("layers.norm",),
    ("layers.activations",),
    ("layers.embedding", "layers.parallel_linear"),
    ("layers.linear",),
    ("layers.attention", "layers.shared", "layers.whole"),
    ("layers.__init__",),
    # What looks at all parameters of a model.
    ("comparison", "optim.layouts", "optim.orthogonal"),
    ("optim.base", "optim.norms", "reductions"),
    ("optim.adafactor", "optim.muon", "optim.state"),
    ("optim.__init__",),
    # Models of Hugging Face transformers, which compute through these layers.
    ("hf.models",),
    (
        "hf.attention",
        "hf.cache",
        "hf.cut_logits",
        "hf.example",
        "hf.generation",
        "hf.inputs",
        "hf.parameters",
        "hf.refused",
    ),
    ("hf.weights",),
    ("hf.config",),
    ("hf.head", "hf.skeleton"),
    ("hf.__init__",),
    # The cut tensor: any operation of torch on parts.
    ("cut.spec",),
    ("cut.tensor",),
    ("cut.adopted",),
    ("cut.others",),
    ("cut.meet",),
    ("cut.deferred",),
    (
        "cut.channels",
        "cut.foreign",
        "cut.heads",
        "cut.joined",
        "cut.linear",
        "cut.lines",
        "cut.ours",
    ),
    ("cut.losses",),
    ("cut.checked", "cut.conv", "cut.einsum", "cut.lookup", "cut.moves", "cut.pointwise"),
    ("cut.solves",),
    ("cut.calls",),
    ("cut.rules",),
    ("cut.__init__",),
    # Which module is cut how.
    ("plans.probe", "plans.style", "plans.text"),
    ("plans.attend", "plans.attention", "plans.collective", "plans.functional_dropout"),
    ("plans.match", "plans.repeated", "plans.strangers"),
    ("plans.module_plan",),
    ("plans.fit", "plans.model_plan", "plans.parts"),
    ("plans.given", "plans.hf_plan", "plans.watched_plan"),
    ("plans.rehearsal",),
    ("plans.watched",),
    ("plans.by_example",),
    ("plans.between", "plans.cut", "plans.twins"),
    ("plans.by_names",),
    ("plans.planning",),
    ("plans.initialize",),
    ("plans.graph",),
    ("plans.compiled",),
    ("plans.apply",),
    ("plans.__init__",),
    # Ranks as threads or processes, and how they are started.
    ("engines.board", "engines.capacity", "engines.fork", "engines.interpreter"),
    ("engines.interrupt", "engines.parcel", "engines.random_state"),
    ("engines.failure",),
    ("engines.watch", "engines.base"),
    ("engines.threads", "engines.processes", "engines.worker"),
    ("engines.__init__",),
    # What a rank did, step by step.
    ("trace.hooks", "trace.places", "trace.step"),
    ("trace.rank", "trace.text"),
    ("trace.trace",),
    ("trace.__init__",),
    ("ranks",),
    # The proof: one run, many runs, the judgement.
    (
        "prover.accuracy",
        "prover.audit",
        "prover.compare",
        "prover.hashing",
        "prover.printed",
        "prover.reference",
    ),
    ("prover.beside", "prover.curve", "prover.rounding", "prover.values", "prover.wide"),
    ("prover.case", "prover.earlier"),
    ("prover.given", "prover.runs", "prover.update"),
    ("prover.training",),
    ("prover.where",),
    ("prover.casereport",),
    ("prover.verdict",),
    ("prover.report",),
    ("prover.against", "prover.contract", "prover.judge"),
    ("prover.proof",),
    ("prover.torchrun",),
    ("prover.__init__",),
    ("cases.cut_or_plain", "cases.draws", "cases.notebooks"),
    ("cases.digits", "cases.ffn", "cases.linear", "cases.matmul", "cases.mlp"),
    ("cases.decoder", "cases.text"),
    ("cases.attention", "cases.lesson"),
    ("cases.gpt",),
    ("cases.models",),
    ("cases.checkpoint",),
    ("cases.catalog",),
    ("cases.__init__",),
    # Mistakes that people make, planted and shown.
    ("mistakes.blocks", "mistakes.edit", "mistakes.optimizers", "mistakes.steps"),
    ("mistakes.mistake",),
    ("mistakes.setups", "mistakes.words"),
    ("mistakes.of_sums", "mistakes.of_training", "mistakes.of_weights", "mistakes.of_words"),
    ("mistakes.gallery", "mistakes.outcome"),
    ("mistakes.__init__",),
    # One step to look at: scenes, then how they are drawn.
    ("showing.moments", "showing.run"),
    ("showing.case_step", "showing.figure"),
    ("showing.grids", "showing.words"),
    ("showing.sends",),
    ("showing.story",),
    ("showing.arrows", "showing.terminal"),
    ("showing.page",),
    ("showing.plan_tree",),
    ("showing.plan_page",),
    ("showing.shown",),
    ("showing.given",),
    ("showing.model_step",),
    ("showing.__init__",),
    # What users import, and the command on top of it.
    ("__init__",),
    # The bench: what is timed and who does it, one rank, all processes, all rounds.
    ("bench.figures", "bench.system", "bench.systems.group"),
    ("bench.work",),
    ("bench.systems.dtensor", "bench.systems.megatron_like", "bench.systems.ours"),
    ("bench.systems.deepspeed", "bench.systems.fairscale", "bench.systems.hf"),
    ("bench.systems.megatron", "bench.systems.memcpy", "bench.systems.plain"),
    ("bench.systems.catalog",),
    ("bench.systems.__init__",),
    ("bench.works.counting", "bench.works.step"),
    ("bench.works.all_reduce", "bench.works.feed_forward", "bench.works.linear"),
    ("bench.works.llama", "bench.works.scaling"),
    ("bench.works.catalog",),
    ("bench.works.__init__",),
    ("bench.environment", "bench.jobs", "bench.proof", "bench.tables"),
    ("bench.plot", "bench.rank"),
    ("bench.fleet", "bench.host"),
    ("bench.run",),
    ("bench.__init__",),
    ("cli.json_file", "cli.losses", "cli.options", "cli.output"),
    ("cli.signals", "cli.streams", "cli.torchrun"),
    ("cli.condense", "cli.machine", "cli.picture", "cli.progress", "cli.selection", "cli.table"),
    ("cli.values",),
    ("cli.request",),
    ("cli.report_text",),
    ("cli.plan_given", "cli.plan_model", "cli.plan_watched"),
    ("cli.bench", "cli.breaking", "cli.doctor", "cli.plan", "cli.prove", "cli.show"),
    ("cli.main",),
    ("cli.__init__",),
    ("__main__",),
)

# Floors apart: the first knows nothing of the others, although they stand below it.
STRANGERS = {
    "numerics": ("axis", "transport"),  # arithmetic on plain tensors, whoever shares them
    "layers": ("transport",),  # a layer talks to an axis, never to what carries its bytes
}

# Extras that may be missing: imported inside the function that needs them, and only there.
OPTIONAL = (
    "deepspeed", "fairscale", "matplotlib", "megatron", "safetensors", "sklearn", "transformers",
)  # fmt: skip

# Built from C where a compiler is there; `core` alone imports them.
EXTENSIONS = ("shardproof._kernels", "shardproof._shm")

# (module, imported): why this import stands inside a function.
INSIDE_FUNCTIONS: dict[tuple[str, str], str] = {
    (
        "bench.systems.dtensor",
        "torch.distributed.tensor",
    ): "a second of imports, for its ranks only",
    (
        "layers.data_parallel",
        "torch.distributed.fsdp",
    ): "a second of imports, for programs that use it",
    ("plans.compiled", "shardproof.plans.graph"): "it imports torch._dynamo: a second",
}


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    is_inside_function: bool


# What `cli.plan_given` imports by the name that a user gives: no module of ours is behind it.
USERS = {"where"}


def module_of(path: Path, src: Path) -> str:
    return ".".join(path.relative_to(src).with_suffix("").parts)


def imports_of(path: Path) -> tuple[Import, ...]:
    """Every import of a file, wherever and however: `from a import b` gives `a.b`."""
    return imports_in(path.read_text())


@functools.cache  # the planted trees below differ in one file each
def imports_in(text: str) -> tuple[Import, ...]:

    def visit(node: ast.AST, is_inside: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, is_inside)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, is_inside)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            written = ast.unparse(node.args[0])
            if written not in USERS:
                name = ast.literal_eval(node.args[0])  # a computed name fails here, and should
                yield Import(name, node.lineno, is_inside)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_inside or is_function)

    return tuple(visit(ast.parse(text), False))


def own_module(target: str, modules: set[str]) -> str | None:
    """Which of our modules an imported name comes from; None if it is not ours."""
    parts = target.split(".")
    if parts[0] != "shardproof":
        return None
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[1:length])
        for candidate in (name, f"{name}.__init__".lstrip(".")):
            if candidate in modules:
                return candidate
    return target


def violations(src: Path) -> list[str]:
    """What in `src` breaks the order, as sentences."""
    place = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
    files = {module_of(path, src): path for path in sorted(src.rglob("*.py"))}
    found = [f"{module} stands on no floor" for module in files if module not in place]
    for module, path in files.items():
        for imported in imports_of(path):
            where = f"{module}:{imported.line}"
            if imported.target.startswith("."):
                found.append(f"{where} imports {imported.target} relatively")
                continue
            if imported.target in EXTENSIONS:
                if module != "core":
                    found.append(f"{where} imports {imported.target}, which only core may")
                continue
            top = imported.target.split(".")[0]
            if imported.is_inside_function and top not in OPTIONAL:
                known = [known for origin, known in INSIDE_FUNCTIONS if origin == module]
                if not any(imported.target.startswith(name) for name in known):
                    found.append(f"{where} imports {imported.target} inside a function")
            if not imported.is_inside_function and top in OPTIONAL:
                found.append(f"{where} imports the optional {top} for everybody")
            target = own_module(imported.target, set(files))
            if target is None or module not in place:
                continue
            if place.get(target, len(FLOORS)) >= place[module]:
                found.append(f"{where} imports {target}, which is not below it")
            if target.split(".")[0] in STRANGERS.get(module.split(".")[0], ()):
                found.append(f"{where} imports {target}, of which it should know nothing")
    return found


def test_imports_only_point_down() -> None:
    assert violations(SRC) == []


def test_every_place_is_taken_once() -> None:
    places = [module for floor in FLOORS for module in floor]
    assert len(places) == len(set(places))
    missing = [m for m in places if not (SRC / (m.replace(".", "/") + ".py")).exists()]
    assert missing == [], "a floor names files that are gone"


def test_every_exception_is_used_and_has_a_reason() -> None:
    for (module, target), reason in INSIDE_FUNCTIONS.items():
        path = SRC / (module.replace(".", "/") + ".py")
        inside = [found.target for found in imports_of(path) if found.is_inside_function]
        assert any(name.startswith(target) for name in inside), f"{module} no longer needs {target}"
        assert reason


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("errors", "from shardproof.axis import Axis", "imports axis, which is not below it"),
        ("errors", "import shardproof.axis", "imports axis, which is not below it"),
        ("reductions", "import shardproof._shm", "imports shardproof._shm, which only core may"),
        ("errors", "from shardproof import tree", "imports tree, which is not below it"),
        ("errors", "from shardproof import launch", "imports __init__, which is not below it"),
        ("leaves", "from shardproof.tree import Node", "imports tree, which is not below it"),
        ("tree", "import shardproof.tree", "imports tree, which is not below it"),
        ("tree", "from .errors import ShapeError", "imports .errors.ShapeError relatively"),
        (
            "reductions",
            "def f():\n    import shardproof.ranks",
            "imports ranks, which is not below it",
        ),
        ("reductions", "def f():\n    import json", "imports json inside a function"),
        ("reductions", "import sklearn.datasets", "imports the optional sklearn for everybody"),
        (
            "reductions",
            "import importlib as i\ni.import_module('sklearn')",
            "imports the optional sklearn for everybody",
        ),
        ("reductions", "if 1:\n    from shardproof.cli import main", "which is not below it"),
        ("numerics.mode", "from shardproof.axis import Axis", "of which it should know nothing"),
        ("brand_new", "import json", "brand_new stands on no floor"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, module: str, line: str, complaint: str) -> None:
    copy = tmp_path / "shardproof"
    shutil.copytree(SRC, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = violations(copy)

    with (copy / (module.replace(".", "/") + ".py")).open("a") as file:
        file.write(f"\n{line}\n")

    planted = [found for found in violations(copy) if found not in before]
    assert all(found.startswith(module) for found in planted)
    assert any(found.endswith(complaint) for found in planted)


def test_a_planted_import_that_is_allowed_is_not_complained_about(tmp_path: Path) -> None:
    copy = tmp_path / "shardproof"
    shutil.copytree(SRC, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = violations(copy)
    for module, line in [
        ("tree", "from shardproof.errors import ShapeError"),
        ("reductions", "from shardproof import leaves"),
        ("reductions", "def f():\n    import sklearn.datasets"),
    ]:
        with (copy / f"{module}.py").open("a") as file:
            file.write(f"\n{line}\n")
    assert violations(copy) == before
