"""The runtime ships inside checkpoints, so its imports are part of the format; the rest must not point backwards."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flexdistill"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in FILES
    if file.name != "__main__.py"
]
RUNTIME = sorted((PACKAGE / "runtime").glob("*.py"))

# lower modules must not import higher ones
LAYERS = [
    {"errors"},
    {"recipe", "recipe_sections", "recipe_stages", "runtime", "progress", "losses", "storage"},
    {"attention_modes", "data", "devices", "example_inputs", "layer_expressions", "loading"}
    | {"packing", "repeats", "sources", "tables"},
    {"attention_search", "conversion", "distillation", "mixture", "rotary_search"}
    | {"self_test", "token_cache", "tracking"},
    {"evaluation", "export", "harness", "hub", "inputs", "plots", "report_figures", "report_html", "runs", "scoring"},
    {"generation", "initialisation", "pipeline", "positions", "recall"},
    {"comparison", "in_memory", "ranking", "report_page", "training"},
    {"api"},
    {"cli", "cli_options", "cli_output", "cli_reports", "cli_scratch", "doctor", "launcher"},
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(file: Path, *, lazy: bool = True) -> list[str]:
    """Absolute names of what a file imports; without `lazy`, on import of the file and not for types only."""
    found = []
    package = ("flexdistill", *file.relative_to(PACKAGE).parts[:-1])

    def visit(node):
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if not lazy and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.extend([module] if node.module else [f"{module}.{alias.name}" for alias in node.names])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return found


def part_of(module: str) -> str | None:
    """`flexdistill.distillation.loop` -> `distill`; None outside the package."""
    parts = module.split(".")
    return parts[1] if parts[0] == "flexdistill" and len(parts) > 1 and parts[1] != "__version__" else None


@pytest.mark.parametrize("file", RUNTIME, ids=lambda file: file.name)
def test_runtime_needs_torch_and_transformers_only(file):
    allowed = {"torch", "transformers", "triton", *sys.stdlib_module_names}
    for name in imports(file):
        top = name.split(".")[0]
        assert top in allowed or name.startswith("flexdistill.runtime."), f"{file.name} imports {name}"


@pytest.mark.parametrize("file", RUNTIME, ids=lambda file: file.name)
def test_runtime_guards_triton(file):
    # transformers checks the imports of a checkpoint's code, and lets guarded ones pass
    tree = ast.parse(file.read_text(encoding="utf-8"))
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and "triton" in ast.unparse(node).split(".")[0].split():
            assert id(node) in guarded, f"{file.name} imports triton outside try"


@pytest.mark.parametrize("file", RUNTIME, ids=lambda file: file.name)
def test_runtime_is_flat_and_imports_siblings_relatively(file):
    assert file.parent.name == "runtime"
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1
            assert not (node.module or "").startswith("flexdistill")


def test_runtime_has_no_folders():
    assert not [file for file in FILES if "runtime" in file.parts[:-2]]


def test_every_module_has_a_layer():
    parts = {part_of(module) for module in MODULES} - {None}
    assert parts - set(LEVELS) == set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_import_points_backwards(file):
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if own not in LEVELS:  # the package's own two files stand above all layers
        assert own in ("__init__", "__main__")
        return
    for module in imports(file, lazy=False):
        part = part_of(module)
        if part is not None and part != own:
            assert LEVELS.get(part, len(LAYERS)) <= LEVELS[own], f"{file.name} imports {module}"


@pytest.mark.parametrize("module", MODULES)
def test_module_imports(module):
    importlib.import_module(module)


def test_command_line_does_not_import_torch():
    code = (
        "import sys, flexdistill.cli; print({'pydantic', 'rich', 'torch', 'transformers', 'yaml'} & set(sys.modules));"
        "import flexdistill.recipe; print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert result.stdout.split() == ["set()", "set()"]
