"""Which room may import which: read from the source, so that a forbidden import fails here and not in production."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import turbo_tvm

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("passes", "schedules", "runtime")  # a bare import would load a second copy


def sources(*places: Path) -> list[Path]:
    files = [f for place in places for f in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    return [f for f in files if f.suffix == ".py"]


ALL = sources(ROOT / "turbo_tvm")
CLI = sources(ROOT / "turbo_tvm" / "cli")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of every import, inside functions too; `from a import b` counts as a and as a.b.

    Packages of scripts are run where they lie and may import relatively.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                assert path.is_relative_to(ROOT / "scripts"), f"{path}:{node.lineno}: a relative import"
                package = module_of(path).rsplit(".", node.level)[0]
                name = f"{package}.{name}".rstrip(".")
            yield node.lineno, name
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)


def violations(files: list[Path], *forbidden: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        for line, name in imports(path)
        if any(name == prefix or name.startswith(prefix + ".") for prefix in forbidden)
    ]


ANYTHING = {"errors", "config", "progress", "tvm_compat"}
TVM = {"tvm", "tvm_ffi", "numpy"}

# What a room may import: rooms and modules of turbo_tvm, and packages beside Python's own. In the order of the flow.
ALLOWED = {
    "ops": {"errors", *TVM},
    "frontends": {
        "errors",
        "progress",
        "tvm_compat",
        "ops",
        "passes",
        "artifact",
        "runtime",
        "torch",
        "transformers",
        "onnx",
        *TVM,
    }
    | {"onnxruntime", "google", "safetensors", "tokenizers"},
    "passes": {"errors", "ops", "tvm_compat", *TVM},
    "schedules": {"errors", "ops", "quick_script", "tvm_compat", *TVM},
    "compiler": {*ANYTHING, "ops", "frontends", "passes", "schedules", "artifact", "runtime", "__version__", "torch"}
    | {"transformers", "onnx", "cuda", "nvidia", "filelock", *TVM},
    "artifact": {"errors", "numpy"},
    "runtime": {*ANYTHING, "artifact", "tokenizers", *TVM},
    "profiling": {*ANYTHING, "ops", "schedules", "artifact", "runtime", "compiler", "filelock", *TVM},
    "tuning": {*ANYTHING, "ops", "schedules", "artifact", "runtime", "profiling", "compiler", "filelock", "xgboost"}
    | {"psutil", *TVM},
}


# `CompiledModel.profile` is a call of convenience: what measures a model stands above it.
EXCEPTIONS = {"turbo_tvm/runtime/model.py": "profiling"}


def foreign(path: Path, room: str) -> list[str]:
    """What a file of a room imports beyond what is allowed."""
    found = []
    for line, name in imports(path):
        first, *rest = name.split(".")
        if first == "turbo_tvm":
            allowed = not rest or rest[0] in {room, EXCEPTIONS.get(str(path.relative_to(ROOT)))} | ALLOWED[room]
        else:
            allowed = first in sys.stdlib_module_names or first in ALLOWED[room]
        if not allowed:
            found.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_what_they_may(room):
    files = sources(ROOT / "turbo_tvm" / room)
    assert not [line for path in files for line in foreign(path, room)]


def test_every_room_is_listed():
    rooms = {p.parent.name for p in (ROOT / "turbo_tvm").glob("*/__init__.py")}
    assert rooms - {"cli", "server"} == set(ALLOWED)


def test_the_links_at_the_top_are_not_needed():
    """A checkout without symbolic links, from a zip or on Windows, works: nothing goes through one."""
    links = [p for p in ROOT.iterdir() if p.is_symlink()]
    assert {p.name for p in links} <= {"passes", "schedules", "runtime", "tuning_logs"}
    assert all(p.resolve() == ROOT / "turbo_tvm" / p.name for p in links)
    assert not [p for p in (ROOT / "turbo_tvm").rglob("*") if p.is_symlink()]


def test_nothing_imports_the_command_line():
    others = [path for path in ALL if path not in CLI and path.name != "__main__.py"]
    assert not violations(others, "turbo_tvm.cli")


def test_rooms_are_imported_under_one_name():
    files = ALL + sources(ROOT / "tests", ROOT / "scripts")
    assert not violations(files, *LINKED)


def test_the_environment_is_read_in_config_only():
    found = []
    for path in ALL:
        for node in ast.walk(ast.parse(path.read_text())):
            read = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")
            if read and path != ROOT / "turbo_tvm" / "config.py":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
    assert not violations([p for p in ALL if p.name != "config.py"], "os.environ", "os.getenv")


@pytest.mark.parametrize("path", ALL, ids=module_of)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_public_names():
    assert turbo_tvm.__all__ == [
        "ArtifactError",
        "CompileError",
        "CompiledModel",
        "Engine",
        "EngineError",
        "InputError",
        "TurboError",
        "__version__",
        "compile",
        "load",
        "tune",
    ]
    assert all(getattr(turbo_tvm, name) is not None for name in turbo_tvm.__all__)
    with pytest.raises(AttributeError, match="module 'turbo_tvm' has no attribute 'other'"):
        _ = turbo_tvm.other


def test_importing_the_package_is_cheap():
    code = "import sys, turbo_tvm; print([m for m in ('tvm', 'torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
