"""The rules of docs/architecture.md that a machine can hold us to."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vlp_jax"

# Who may import whom inside vlp_jax. `LEAVES` may be imported by all but `models`.
MAY_IMPORT = {
    "models": set(),
    "data": set(),
    "observe": set(),
    "parallel": set(),
    "objectives": {"models", "parallel"},
    "evaluators": {"objectives", "data", "parallel", "observe"},
    "training": {
        "evaluators",
        "objectives",
        "data",
        "parallel",
        "observe",
        "interop",
        "models",
    },
    "interop": {"models"},
    "serve": {"encoders", "inspection", "training", "parallel"},
    "encoders": {
        "training",
        "evaluators",
        "objectives",
        "data",
        "parallel",
        "interop",
        "models",
    },
    "inspection": {"models", "observe", "evaluators"},
    "handover": {"training", "objectives", "observe", "interop", "models", "data"},
    "report": {
        "encoders",
        "evaluators",
        "inspection",
        "training",
        "data",
        "observe",
        "models",
    },
    "planning": {"training", "objectives", "models", "parallel", "observe"},
}
LEAVES = {"arguments", "config", "defaults", "errors", "files", "image_size", "overrides"}
LEAVES |= {"preprocess", "signals", "versions"}
ENTRY_POINTS = {"config_help", "train", "evaluate", "export", "smoke", "commands"}
ENTRY_POINTS |= {"__init__", "__main__"}
MODELS_MAY_IMPORT = {"flax", "jax", "einops", "jaxtyping", "numpy"}
MAX_FILE, MAX_FUNCTION = 400, 60

FILES = sorted(PACKAGE.rglob("*.py"))
OURS = sorted([*FILES, *(ROOT / "tools").rglob("*.py"), *(ROOT / "configs").rglob("*.py")])


def imports(file):
    """(module, line, inside a function or `if TYPE_CHECKING`) of every import."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        above, lazy = node, False
        while hasattr(above, "parent"):
            above = above.parent
            lazy |= isinstance(above, ast.FunctionDef | ast.If)
        for name in names:
            yield name, node.lineno, lazy


def room(file):
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_one_way(file):
    here = room(file)
    for name, line, _ in imports(file):
        parts = name.split(".")
        if parts[0] != "vlp_jax" or len(parts) < 2 or here in ENTRY_POINTS:
            continue
        other = parts[1]
        allowed = MAY_IMPORT.get(here, set()) | {here} | LEAVES
        if here == "models":
            allowed -= LEAVES
        if here in LEAVES:
            allowed = LEAVES
        assert other in allowed, f"{file}:{line}: {here} must not import {other}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_tensorflow_is_imported_in_data_alone_and_lazily_and_jax_never_there(file):
    for name, line, lazy in imports(file):
        top = name.split(".")[0]
        if top in ("tensorflow", "tensorflow_datasets", "tf_keras", "keras"):
            builder = file.name in ("builder.py", "records.py")  # imported by name, when needed
            own_process = file.parent.name == "foreign"  # what is run or copied as a file
            allowed = (room(file) == "data" and (lazy or builder)) or (own_process and lazy)
            assert allowed, f"{file}:{line}: {name}"
        if top in ("jax", "flax", "optax"):
            assert room(file) != "data", f"{file}:{line}: {name}"
        if room(file) == "models":
            known = MODELS_MAY_IMPORT | {"vlp_jax", "__future__"} | STANDARD
            assert top in known, f"{file}:{line}: models must not import {name}"


STANDARD = {"collections", "dataclasses", "functools", "inspect", "math", "typing"}


@pytest.mark.parametrize("file", OURS, ids=lambda f: str(f.relative_to(ROOT)))
def test_sizes_keep_a_reader(file):
    text = file.read_text()
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION, f"{file}:{node.lineno}: {node.name} has {lines} lines"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_public_functions_and_classes_have_docstrings(file):
    for node in ast.parse(file.read_text()).body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
        assert not public or ast.get_docstring(node), f"{file}:{node.lineno}: {node.name}"


def test_importing_the_package_does_not_import_tensorflow():
    import subprocess
    import sys

    code = (
        "import sys; import vlp_jax.train, vlp_jax.evaluate; "
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
