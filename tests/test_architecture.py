"""Imports point down: what docs/architecture.md says in words, read from the sources."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from transformers.utils import import_utils

SOURCE = Path(__file__).resolve().parents[1] / "src"

# From the top. A module may import from its own package and from the layers below it, not from its neighbors.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("lab",),
    ("algorithms", "report"),
    ("training",),
    ("evaluation",),
    ("rewards",),
    ("card", "data", "sampling", "scoring"),
    ("models", "results", "testing"),
    ("files", "groups", "launch", "losses", "progress", "ranges", "terminal"),
    ("errors",),
    ("visible",),
)
HEIGHT = {package: height for height, layer in enumerate(reversed(LAYERS)) for package in layer}

# trl offers public functions for formats and arguments; what trains is ours.
FROM_TRL = {"ModelConfig", "ScriptArguments", "TrlParser", "get_peft_config", "get_quantization_config"}


def modules():
    """Every module of the package by its dotted name, without those that hold nothing."""
    files = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCE.rglob("*.py")
    }
    return {name: path for name, path in files.items() if path.read_text(encoding="utf-8").strip()}


def imports(name, path):
    """(module, imported name or None) of every import, wherever it stands; relative ones made absolute.

    What is imported for a type checker alone is left out: it names a type and never runs.
    """
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def package_of(module):
    """The part of the house that a module belongs to: 'cli' of 'tutelage.cli.train'."""
    return module.split(".")[1]


MODULES = modules()
OURS = {name: path for name, path in MODULES.items() if name != "tutelage"}


def ours(name):
    """What the module imports of this project, as modules."""
    for module, imported in imports(name, MODULES[name]):
        if module.split(".")[0] == "tutelage":
            yield f"{module}.{imported}" if f"{module}.{imported}" in MODULES else module


def test_reading_imports(tmp_path):
    """The reader itself: a relative import, one inside a function and a type's."""
    path = tmp_path / "module.py"
    path.write_text(
        "import torch.nn\n"
        "from ..errors import UserError\n"
        "from . import trees\n"
        "if TYPE_CHECKING:\n    from tutelage.training import Trainer\n"
        "def later():\n    from tutelage.cli import main\n"
    )
    assert set(imports("tutelage.data.module", path)) == {
        ("torch.nn", None),
        ("tutelage.errors", "UserError"),
        ("tutelage.data", "trees"),
        ("tutelage.cli", "main"),
    }


def test_every_module_has_its_layer():
    assert {package_of(name) for name in OURS} == set(HEIGHT)


@pytest.mark.parametrize("name", OURS)
def test_imports_point_down(name):
    package = package_of(name)
    others = {package_of(module) for module in ours(name)} - {package}
    upward = {other for other in others if HEIGHT[other] >= HEIGHT[package]}
    assert not upward, f"{name} imports {', '.join(sorted(upward))}, which is not below it"


def test_report_needs_nothing_but_numbers():
    """A report can be written of a results.json alone: no engine, no model."""
    needed = {module for name in OURS if package_of(name) == "report" for module in ours(name)}
    outside = {module for module in needed if package_of(module) != "report"}
    assert outside <= {"tutelage.evaluation.statistics", "tutelage.errors", "tutelage.results", "tutelage.visible"}


def test_no_cycles():
    graph = {name: set(ours(name)) - {name} for name in OURS}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules
    assert len(order) == len(graph)


def test_the_trainers_of_trl_are_never_imported():
    taken = {
        (name, imported or module)
        for name, path in MODULES.items()
        for module, imported in imports(name, path)
        if module.split(".")[0] == "trl"
    }
    assert {imported for _, imported in taken} <= FROM_TRL, taken
    assert {name for name, _ in taken} == {"tutelage.cli.arguments"}


def test_underscored_names_stay_in_their_module():
    borrowed = [
        (name, module, imported)
        for name, path in MODULES.items()
        for module, imported in imports(name, path)
        if any(part.startswith("_") and not part.startswith("__") for part in f"{module}.{imported}".split("."))
    ]
    assert not borrowed


def test_no_folder_of_tests_passes_for_a_package_that_libraries_look_for():
    """They are importable by their names, and a library that looks for vllm would find them."""
    looked_for = {name[3:-10] for name in dir(import_utils) if name.startswith("is_") and name.endswith("_available")}
    folders = {path.name for path in Path(__file__).parent.iterdir() if path.is_dir()}
    assert len(looked_for) > 50
    assert not folders & (looked_for | {"vllm", "trl", "ray", "mergekit", "liger_kernel", "unsloth"})
