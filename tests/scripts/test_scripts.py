"""The scripts that README and CI call: executable, well-formed, and tied to no machine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    ROOT / ".ci" / "run",
    *sorted(p for p in (ROOT / "scripts").iterdir() if p.is_file() and not p.suffix),
]

MACHINE_PATHS = re.compile(r"(?<![\w.])/(work|root|opt|home)/")
REGISTRIES = re.compile(r"pypi\.org|pythonhosted|download\.pytorch|--index-url|conda\.")


def tracked_files() -> list[Path]:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in done.stdout.split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink() and path != Path(__file__).resolve()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_executable_bash(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_runs_what_people_run() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[1:] == [
        'exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/test" --all'
    ]


def test_install_wants_an_extra() -> None:
    done = subprocess.run([str(ROOT / "scripts" / "install")], capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: scripts/install EXTRA" in done.stderr


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRIES], ids=["machine paths", "registries"])
def test_files_name_no_machine_and_no_registry(pattern: re.Pattern) -> None:
    found = []
    for path in tracked_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


def test_every_folder_of_the_package_is_a_package() -> None:
    """What has no __init__.py is in no wheel."""
    folders = {p.parent for p in (ROOT / "turbo_tvm").rglob("*.py")}
    assert not [p for p in sorted(folders) if not (p / "__init__.py").is_file()]


def test_demo_sentences_vary() -> None:
    words = sorted(len(line.split()) for line in (ROOT / "scripts" / "demo_sentences.txt").read_text().splitlines())
    assert len(words) >= 40 and words[0] <= 3 and words[-1] >= 190
