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
ROOMS = {"passes": ROOT / "passes", "schedules": ROOT / "schedules", "runtime": ROOT / "runtime"}
ELSEWHERE = [p for p in sorted((ROOT / "turbo_tvm").iterdir()) if not p.is_symlink()]


def sources(*places: Path) -> list[Path]:
    files = [f for place in places for f in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    return [f for f in files if f.suffix == ".py"]


ALL = sources(*ROOMS.values(), *ELSEWHERE)
CLI = sources(ROOT / "turbo_tvm" / "cli")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("turbo_tvm", *parts) if parts[0] in ROOMS else parts)


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


RULES = {
    "passes": ["turbo_tvm.schedules", "turbo_tvm.kernels", "turbo_tvm.frontends", "turbo_tvm.cli", "torch"],
    "schedules": ["turbo_tvm.passes", "turbo_tvm.kernels", "turbo_tvm.frontends", "turbo_tvm.cli", "torch"],
    "runtime": [
        *("turbo_tvm.passes", "turbo_tvm.schedules", "turbo_tvm.kernels", "turbo_tvm.frontends", "turbo_tvm.cli"),
        *("turbo_tvm.pipeline", "turbo_tvm.compiler", "torch", "onnx", "onnxruntime", "transformers"),
    ],
}


@pytest.mark.parametrize("room", RULES)
def test_rooms(room):
    files = sources(ROOMS[room])
    assert len(files) > 5
    assert not violations(files, *RULES[room])


def test_nothing_imports_the_command_line():
    others = [path for path in ALL if path not in CLI and path.name != "__main__.py"]
    assert not violations(others, "turbo_tvm.cli")


def test_rooms_are_imported_under_one_name():
    files = ALL + sources(ROOT / "tests", ROOT / "scripts")
    assert not violations(files, *ROOMS)


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
