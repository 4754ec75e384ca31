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
    ("operands", "checked_values"),
    ("environment", "files", "torchrun"),
    ("checked_objects",),
    ("autograd", "batch_leaves", "checking", "c_modules", "error_text", "extras", "leaves"),
    ("index_runs", "tree"),
    ("heads", "observing", "safetensors_file", "scheme", "timeout", "units"),
    ("operators",),
    ("block_layout",),
    # One forward of any module, and what of it can be cut apart: labels, rules, families.
    ("watching.atoms", "watching.kinds"),
    ("watching.record",),
    ("watching.factors",),
    ("watching.labelled", "watching.needs"),
    ("watching.boundaries", "watching.moving", "watching.rules"),
    ("watching.contractions", "watching.lookups", "watching.norm_rules"),
    ("watching.running",),
    ("watching.forward",),
    ("watching.family",),
    ("watching.choice",),
    ("watching.__init__",),
    # Bytes between ranks.
    ("transport.ledger", "transport.notes"),
    ("transport.base",),
    ("transport.agreement", "transport.host_sums", "transport.presence", "transport.subgroups"),
    ("transport.asking", "transport.portable", "transport.rendezvous", "transport.stream"),
    ("transport.incore", "transport.segment"),
    (
        "transport.distributed",
        "transport.rehearsed",
        "transport.shared_memory",
        "transport.solo",
        "transport.threads",
    ),
    ("transport.disabled", "transport.hosts"),
    ("transport.choose",),
    ("transport.__init__",),
    ("axis",),
    # Arithmetic on plain tensors.
    ("numerics.precision",),
    ("numerics.mode", "numerics.elementwise", "numerics.sums", "numerics.random"),
    ("numerics.piecewise", "numerics.products"),
    ("numerics.matmul",),
    (
        "numerics.batched_products",
        "numerics.safe_functions",
        "numerics.indexing",
        "numerics.summed_products",
        "numerics.dim_sums",
    ),
    ("numerics.attention_math", "numerics.broadcasting"),
    ("numerics.torch_activations", "numerics.torch_products", "numerics.sdpa", "numerics.powers"),
    (
        "numerics.convolutions",
        "numerics.einsum",
        "numerics.vector_norms",
        "numerics.pooling",
        "numerics.softmax_and_norms",
    ),
    ("numerics.arithmetic", "numerics.channel_norms", "numerics.whole_cross_entropy"),
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
        "ops.class_targets",
        "ops.head_split",
        "ops.linear_steps",
        "ops.rows",
        "ops.sampling",
        "ops.vocabulary_blocks",
    ),
    ("ops.embedding", "ops.linear_products", "ops.losses", "ops.tokens"),
    ("ops.attention", "ops.linear", "ops.unit_split", "ops.vocabulary"),
    ("ops.shared",),
    ("ops.unit_moves", "ops.unit_products"),
    (
        "ops.unit_softmax",
        "ops.unit_lookup",
        "ops.unit_sums",
        "ops.input_gradients",
        "ops.shared_units",
    ),
    ("ops.unit_linear",),
    ("ops.unit_contract",),
    ("ops.unit_ops",),
    ("ops.dropout", "ops.rms_norm"),
    ("ops.cut_norms",),
    ("ops.norms",),
    ("functional", "ops.__init__"),
    # What of torch would take a shard for the whole.
    ("layers.registry", "layers.function_replacement"),
    ("layers.step_guard",),
    (
        "layers.data_parallel_guard",
        "layers.refused_functions",
        "layers.grad_scaler",
        "layers.state_guard",
    ),
    ("layers.init_guard", "layers.guard"),
    ("layers.base",),
    ("layers.cut_module", "layers.dropout", "layers.rms_formula"),
    ("layers.norm",),
    ("layers.activations",),
    ("layers.embedding", "layers.parallel_linear"),
    ("layers.linear",),
    ("layers.attention", "layers.shared", "layers.replicated_input"),
    ("layers.__init__",),
    # What looks at all parameters of a model.
    ("comparison", "optim.layouts", "optim.orthogonal"),
    ("optim.whole_optimizer", "optim.gradient_norms", "reductions"),
    ("optim.adafactor", "optim.muon", "optim.state"),
    ("optim.__init__",),
    # Models of Hugging Face transformers, which compute through these layers.
    ("hf.detection", "hf.saving"),
    # Whole models as plain directories.
    ("checkpoint.directory", "checkpoint.entries", "checkpoint.together"),
    ("checkpoint.fully_sharded", "checkpoint.manifest", "checkpoint.writing", "hf.weights"),
    ("checkpoint.background",),
    ("checkpoint.save",),
    ("checkpoint.load", "checkpoint.series"),
    ("checkpoint.__init__",),
    (
        "hf.attention_registry",
        "hf.cache",
        "hf.cut_logits",
        "hf.example",
        "hf.generation",
        "hf.inputs",
        "hf.parameters",
        "hf.refused",
    ),
    ("hf.config", "hf.tokenizer"),
    ("hf.head", "hf.skeleton"),
    ("hf.__init__",),
    # The cut tensor: any operation of torch on parts.
    ("cut.spec",),
    ("cut.tensor",),
    ("cut.adopted", "cut.own_tokens"),
    ("cut.fallback",),
    ("cut.alignment",),
    ("cut.deferred",),
    (
        "cut.channels",
        "cut.autograd_functions",
        "cut.head_attention",
        "cut.concatenation",
        "cut.matrix_products",
        "cut.along_dim",
        "cut.own_functions",
    ),
    ("cut.class_losses",),
    ("cut.checked", "cut.conv", "cut.contraction", "cut.lookup", "cut.moves", "cut.pointwise"),
    ("cut.solves",),
    ("cut.module_calls",),
    ("cut.along_tokens",),
    ("cut.all_rules",),
    ("cut.__init__",),
    # Which module is cut how.
    ("plans.probe", "plans.style", "plans.plan_text"),
    (
        "plans.attention_check",
        "plans.attention_modules",
        "plans.collective",
        "plans.functional_dropout",
        "plans.paper_formulas",
    ),
    ("plans.match", "plans.cached_layouts", "plans.unsupported"),
    ("plans.module_plan",),
    ("plans.fit", "plans.model_plan", "plans.module_planner"),
    ("plans.plan_argument", "plans.hf_plan", "plans.watched_plan"),
    ("plans.rehearsal", "plans.sequence_parallel", "plans.token_collectives"),
    ("plans.watched",),
    ("plans.by_example",),
    ("plans.layer_forwards", "plans.cutter", "plans.replacements"),
    ("plans.by_names",),
    ("plans.planning",),
    ("plans.initialize",),
    ("plans.graph",),
    ("plans.compiled",),
    ("plans.apply",),
    ("plans.__init__",),
    # Batches that ranks share.
    ("arriving_gradients", "gradient_buckets"),
    ("batch_gradients",),
    ("gradient_exchange",),
    ("data_parallel_step",),
    ("data_parallel",),
    ("sharded_optimizer",),
    # Ranks as threads or processes, and how they are started.
    ("engines.status", "engines.capacity", "engines.fork", "engines.interpreter"),
    ("engines.interrupt", "engines.messages", "engines.random_state"),
    ("engines.failure",),
    ("engines.watch", "engines.engine"),
    ("engines.threads", "engines.processes", "engines.worker"),
    ("engines.__init__",),
    # What a rank did, step by step.
    ("trace.hooks", "trace.placements", "trace.step"),
    ("trace.rank", "trace.text"),
    ("trace.trace",),
    ("trace.__init__",),
    ("ranks",),
    # A whole training: what `shardproof train` runs on each rank.
    ("stop_signal", "text_batches"),
    ("plans.host_cost",),
    ("plans.layout_cost", "training_run"),
    # The proof: what a case is, one run, the judgement, many runs, the cases.
    ("prover.compare", "prover.curve", "prover.hashing"),
    ("prover.case",),
    ("prover.training",),
    ("prover.fault_location", "prover.recording"),
    ("prover.case_report", "prover.layout_map", "prover.resuming"),
    ("prover.judge", "prover.report"),
    ("prover.compare_reports", "prover.proof"),
    ("prover.prove_model",),
    ("prover.__init__",),
    ("prover.cases.drawn_layers", "prover.cases.notebooks"),
    (
        "prover.cases.digits",
        "prover.cases.matmul_cases",
        "prover.cases.mlp",
        "prover.cases.single_linear",
    ),
    ("prover.cases.text_training",),
    ("prover.cases.gpt", "prover.rank_layouts"),
    ("prover.cases.transformer_block", "prover.cases.transformers_models"),
    ("prover.cases.__init__",),
    # Mistakes that people make, planted and shown.
    ("mistakes.cut_training", "mistakes.edit"),
    ("mistakes.mistake",),
    ("mistakes.trainings",),
    ("mistakes.language_model",),
    (
        "mistakes.of_language_models",
        "mistakes.of_sums",
        "mistakes.of_training",
        "mistakes.of_weights",
    ),
    ("mistakes.outcome",),
    ("mistakes.__init__",),
    # Programs of others: what a run shows, how its tensors lie, the first fault, and its kind.
    ("checker.mistake_kinds", "checker.placement", "checker.program"),
    ("checker.drawing", "checker.program_file", "checker.step_recording", "checker.check_report"),
    ("checker.layout",),
    ("checker.judging",),
    ("checker.dropout", "checker.locating"),
    ("checker.evidence",),
    ("checker.in_losses", "checker.in_outputs", "checker.replayed"),
    ("checker.in_gradients",),
    ("checker.in_updates",),
    ("checker.mistakes",),
    ("checker.check_program",),
    ("checker.__init__",),
    # One step to look at: scenes, then how they are drawn.
    ("showing.actions", "showing.step_runs"),
    ("showing.tensors",),
    ("showing.sentences",),
    ("showing.arrows",),
    ("showing.scenes",),
    ("showing.page", "showing.terminal"),
    ("showing.check_page", "showing.plan_tree"),
    ("showing.plan_page",),
    ("showing.show",),
    ("showing.__init__",),
    # What users import, and the command on top of it.
    ("__init__",),
    ("cli.cases", "cli.output", "cli.output_file", "cli.signals"),
    ("cli.options", "cli.plan_tables", "cli.tensor_table"),
    ("cli.plan_layout", "cli.report_text", "cli.ranks_here", "cli.training_log"),
    ("cli.prove_layouts",),
    (
        "cli.break_",
        "cli.check",
        "cli.checkpoint",
        "cli.doctor",
        "cli.generate",
        "cli.plan",
        "cli.prove",
        "cli.show",
        "cli.train",
    ),
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
OPTIONAL = ("matplotlib", "safetensors", "sklearn", "transformers")

# They stand beside the package and are not installed with it.
TOOLS = ("benchmarks", "gpu", "zoo")

# Built from C where a compiler is there; `c_modules` alone imports them.
EXTENSIONS = ("shardproof._kernels", "shardproof._shm")

# (module, imported): why this import stands inside a function.
INSIDE_FUNCTIONS: dict[tuple[str, str], str] = {
    (
        "layers.data_parallel_guard",
        "torch.distributed.fsdp",
    ): "a second of imports, for programs that use it",
    ("checkpoint.fully_sharded", "torch.distributed.tensor"): "for models that fully_shard divided",
    ("plans.compiled", "shardproof.plans.graph"): "it imports torch._dynamo: a second",
}


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    is_inside_function: bool


# What `cli.plan` imports by the name that a user gives: no module of ours is behind it.
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
                if module != "c_modules":
                    found.append(f"{where} imports {imported.target}, which only c_modules may")
                continue
            top = imported.target.split(".")[0]
            if top in TOOLS:
                found.append(f"{where} imports {top}, which is not installed")
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
        (
            "reductions",
            "import shardproof._shm",
            "imports shardproof._shm, which only c_modules may",
        ),
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
        ("reductions", "from benchmarks import run", "imports benchmarks, which is not installed"),
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
