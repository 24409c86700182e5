"""Imports point one way, and a clone holds what a newcomer looks for. Files are read, not run."""

import ast
import functools
import graphlib
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("optimizers", "models", "engine", "recipes", "tools")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

ONLY = {"optimizers": {"torch"}, "models": {"torch", "einops"}}  # besides the standard library and itself
NEVER = {"engine": {"models", "tools", "recipes"}, "recipes": {"tools"}}
CONTRACT = "models.segment"  # the one module of the models that the engine reads: what a segment is
UNSAFE = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
ENTRIES = ("tests", "pyproject.toml", "constraints.txt", "Makefile", ".ci/run", "README.md", "CHANGELOG.md", "LICENSE")
each_package = pytest.mark.parametrize("package", PACKAGES)


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def files(package: str) -> list[Path]:
    return [file for file in FILES if file.relative_to(ROOT).parts[0] == package]


@functools.cache
def nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Every imported module as a full name, with its line; also imports inside functions."""
    package = file.relative_to(ROOT).parent.parts
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join((*parents, *filter(None, [node.module])))
            for alias in node.names:
                submodule = ROOT / f"{base}.{alias.name}".replace(".", "/")
                whole = submodule.is_dir() or submodule.with_suffix(".py").is_file()
                yield (f"{base}.{alias.name}" if whole else base), node.lineno


@each_package
def test_imports_point_one_way(package):
    for file in files(package):
        for name, line in imports(file):
            top = name.partition(".")[0]
            where = f"{file.relative_to(ROOT)}:{line} imports {name}"
            assert top not in NEVER.get(package, set()) or name == CONTRACT, f"{where}; {package} must not know {top}"
            if package in ONLY and top != package and top not in sys.stdlib_module_names:
                assert top in ONLY[package], f"{where}; {package} may import only {sorted(ONLY[package])}"


@each_package
def test_imports_are_relative_inside_a_package(package):
    for file in files(package):
        for node in nodes(file):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in names:
                where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                assert name.partition(".")[0] != package, f"{where} write {name} with a dot"


REFERENCES = sorted((ROOT / "tests" / "reference").glob("*.py"))


@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.stem)
def test_a_reference_does_not_know_what_it_checks(file):
    names = {name.partition(".")[0] for name, _ in imports(file)}
    assert names <= {"numpy", "torch"} | sys.stdlib_module_names, names


@each_package
def test_no_import_cycles(package):
    graph = {module_of(file): {name for name, _ in imports(file) if name != package} for file in files(package)}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@each_package
def test_nothing_reads_or_writes_code_as_data(package):
    """Checkpoints and data are tensors and JSON: no format whose reading can run code."""
    for file in files(package):
        where = file.relative_to(ROOT)
        for node in nodes(file):
            of_torch = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
            used = {node.attr} if of_torch else set()
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                used = {alias.name for alias in node.names}
            assert not used & {"load", "save"}, f"{where}:{getattr(node, 'lineno', 0)} torch.{used}; use safetensors"
        for name, line in imports(file):
            assert name.partition(".")[0] not in UNSAFE, f"{where}:{line} imports {name}; use safetensors or JSON"


@each_package
def test_text_files_have_an_encoding(package):
    """The system's own may be ASCII, and then a run ends at the first character that is not."""
    for file in files(package):
        for node in nodes(file):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name not in ("write_text", "read_text", "open"):
                continue
            called = ast.unparse(node.func)
            mode = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            mode = [value for value in mode if isinstance(value, str) and set(value) <= set("rwaxbt+")]
            on_bytes = any("b" in value for value in mode) or "_OPEN" in called
            if (name == "open" and on_bytes) or called in ("os.open", "bz2.open", "webbrowser.open"):
                continue
            where = f"{file.relative_to(ROOT)}:{node.lineno}"
            assert any(k.arg == "encoding" for k in node.keywords), f"{where} name the encoding"


@each_package
def test_each_package_is_the_one_in_this_repository(package):
    file = importlib.import_module(package).__file__
    assert file, f"{package}/ has no __init__.py"
    assert Path(file).resolve() == ROOT / package / "__init__.py", f"another {package} hides this one on sys.path"


@pytest.mark.parametrize("entry", [*PACKAGES, *ENTRIES])
def test_required_entries_exist(entry):
    assert (ROOT / entry).exists()


def test_the_reader_of_imports_sees_every_form(tmp_path, monkeypatch):
    """A check that finds nothing is worth nothing: feed it each way of writing an import."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "step.py").touch()
    file = tmp_path / "engine" / "x.py"
    file.write_text(
        "import recipes.sumo as s, torch.nn\nfrom tools import plot\nfrom . import step\nfrom .step import a\n"
        "def f():\n    from recipes.omgd import main\n"
    )
    assert {name for name, _ in imports(file)} == {"recipes.sumo", "torch.nn", "tools", "engine.step", "recipes.omgd"}


def test_names_of_test_files_are_unique():
    """Pytest imports each as a module by its name alone, whatever its folder."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
