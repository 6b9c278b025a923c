"""Imports go one way, nothing that is loaded can run code, and what should start fast imports little."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import autoseg

ROOT = Path(__file__).parents[1]
STAGES = ("experiment_planning", "preprocessing", "training", "inference")

# the core, from below: a module imports from its own layer (without a ring) and from those above it in this list
LAYERS = (
    {"errors", "__init__"},
    {"files", "typed_json", "units", "locks", "charts", "page", "integrity", "executor", "cluster", "device", "extras"},
    {"geometry", "image", "labels"},
    {"dataset", "plan", "plan_values", "acquisition"},
    {"reading"},
    {"workspace", "networks", "metrics", "forecast"},
    {"checkpoint"},
)
FACE = {
    "cli",
    "options",
    "status",
    "screen",
    "pipeline",
    "stages",
    "contest",
    "agenda",
    "demo",
    "report",
    "results",
    "__main__",
}
STAGE_MAY_IMPORT = {
    "preprocessing": {"core"},
    "training": {"preprocessing", "core"},
    "inference": {"preprocessing", "core"},
    "experiment_planning": {"training", "preprocessing", "core"},
}
# what worker processes import: they read and preprocess, so torch (1 s and 200 MB in each) has no place in them
WORKER_MODULES = (
    "autoseg.executor",
    "autoseg.dataset",
    "autoseg.reading",
    "autoseg.preprocessing.run",
    "autoseg.experiment_planning.fingerprint",
    "autoseg.experiment_planning.verify",
    "autoseg.inference.evaluation",
)


def module_files() -> dict[str, Path]:
    """`autoseg.training.loop` -> its file, as the package is installed."""
    files: dict[str, Path] = {}
    package = Path(autoseg.__file__).parent
    for path in sorted(package.rglob("*.py")):
        files[".".join(("autoseg", *path.relative_to(package).with_suffix("").parts))] = path
    if (ROOT / "autoseg").resolve() == package.resolve():
        for stage in STAGES:
            for path in sorted((ROOT / stage).rglob("*.py")):
                files[".".join(("autoseg", *path.relative_to(ROOT).with_suffix("").parts))] = path
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


FILES = module_files()


def imports(path: Path, *, inside_functions: bool) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, with its line; `from autoseg import x` is autoseg.x where that is a module."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))) if inside_functions else _top_level(path)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write `from autoseg...`, not a relative import"
            base = node.module or ""
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield (name if name in FILES else base, node.lineno)


def _top_level(path: Path) -> list[ast.AST]:
    """Statements that run when the module is imported: not the bodies of functions, nor what is for type checkers."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        found.append(node)
        waiting.extend(ast.iter_child_nodes(node))
    return found


def room(module: str) -> str:
    """`core`, `face`, or the stage that a module belongs to."""
    parts = module.split(".")
    if len(parts) == 1:
        return "core"
    if parts[1] in STAGES:
        return parts[1]
    return "face" if parts[1] in FACE else "core"


def layer(module: str) -> int:
    """The number of a core module's layer, 0 the lowest."""
    part = (module.split(".") + ["__init__"])[1]
    for number, names in enumerate(LAYERS):
        if part in names:
            return number
    raise AssertionError(f"{module} stands in no layer of tests/test_imports.py; add it where it belongs")


def own_imports() -> Iterator[tuple[str, str, str]]:
    """(module, imported module of autoseg, where it says so), the bodies of functions included."""
    for module, path in FILES.items():
        for imported, line in imports(path, inside_functions=True):
            if imported.split(".")[0] == "autoseg":
                yield module, imported, f"{path}:{line}"


def test_every_module_is_found() -> None:
    assert {"autoseg", "autoseg.cli", "autoseg.plan", "autoseg.networks", "autoseg.training.loop"} <= set(FILES)


def test_stages_import_only_what_lies_below_them() -> None:
    wrong = []
    for module, imported, where in own_imports():
        here, there = room(module), room(imported)
        if here == "face" or module == "autoseg" or here == there:
            continue
        if here == "core" or there not in STAGE_MAY_IMPORT[here]:
            wrong.append(f"{where}: {module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_core_modules_import_only_from_their_own_layer_and_those_below() -> None:
    wrong = [
        f"{where}: {module} imports {imported}"
        for module, imported, where in own_imports()
        if room(module) == room(imported) == "core" and module != "autoseg" and layer(module) < layer(imported)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_ring_of_imports() -> None:
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for module, path in FILES.items():
        for imported, _ in imports(path, inside_functions=False):
            if imported.split(".")[0] == "autoseg" and imported not in (module, "autoseg"):
                graph[module].add(imported)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError naming the ring


def test_no_stage_is_imported_by_its_bare_name() -> None:
    wrong = [
        f"{path}:{line}: {imported}"
        for path in FILES.values()
        for imported, line in imports(path, inside_functions=True)
        if imported.split(".")[0] in STAGES
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_that_is_loaded_can_run_code() -> None:
    # the executor's pipes carry pickles between processes of one command; no file does
    wrong = []
    for module, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        for imported, line in imports(path, inside_functions=True):
            if (
                imported.split(".")[0] in ("pickle", "shelve", "marshal", "joblib", "dill")
                and module != "autoseg.executor"
            ):
                wrong.append(f"{path}:{line}: {imported}")
        for call in ("torch.load(", "torch.save(", "allow_pickle=True", "eval(", "exec("):
            for number, line_text in enumerate(text.splitlines(), start=1):
                words = line_text.replace(".eval(", "").replace("def eval(", "")
                if call in words:
                    wrong.append(f"{path}:{number}: {call}")
    assert not wrong, "\n".join(wrong)


def test_only_the_face_prints_and_reads_the_environment() -> None:
    wrong = []
    for module, path in FILES.items():
        if room(module) == "face":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                wrong.append(f"{path}:{node.lineno}: print")
            # the executor hands its environment on to its workers
            reads = isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
            if reads and module != "autoseg.executor":
                wrong.append(f"{path}:{node.lineno}: environment")
    assert not wrong, "\n".join(wrong)


def modules_after(statement: str) -> set[str]:
    """What is loaded in a fresh interpreter after `statement`."""
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(run.stdout.split())


@pytest.mark.parametrize("statement", ["import autoseg", "import autoseg.cli"])
def test_the_package_and_the_command_line_import_nothing_heavy(statement: str) -> None:
    heavy = {"torch", "numpy", "scipy", "SimpleITK", "sklearn", "matplotlib", "rich", "blosc2"}
    assert not heavy & modules_after(statement)


@pytest.mark.parametrize("module", WORKER_MODULES)
def test_modules_of_worker_processes_do_not_import_torch(module: str) -> None:
    assert "torch" not in modules_after(f"import {module}")
