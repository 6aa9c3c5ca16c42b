"""The linters and the type checker, as tests; and what no file of the project may say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NOT_OURS = {
    ".git",
    ".venv",
    ".cache",
    "__pycache__",
    ".hypothesis",
    ".pytest_cache",
    ".ruff_cache",
    ".mypy_cache",
    "dist",
}
# Folders of machines that the project was written on, and the tools there: they mean nothing to anybody else.
# Written in two pieces, so that this file does not say them either.
FOREIGN = re.compile(rb"(?<![\w.])/wo" + rb"rk/|\bfa" + rb"rm-|\.li" + rb"brary\b")


def run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{Path(command[0]).name}:\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_check():
    run(BIN / "ruff", "check", "--quiet", ".")


def test_ruff_format():
    """`make format` puts it right."""
    run(BIN / "ruff", "format", "--check", "--diff", "--quiet", ".")


def test_mypy():
    run(sys.executable, "-m", "mypy", "--no-error-summary")


def test_shell_scripts_parse():
    for script in [ROOT / ".ci" / "run", *sorted((ROOT / "scripts").iterdir())]:
        if script.is_file() and b"bash" in script.read_bytes()[:20]:
            run("bash", "-n", script)


def our_files():
    for where, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS]
        for name in names:
            path = Path(where, name)
            if path.is_file() and not path.is_symlink():
                yield path


def test_no_file_names_the_machine_it_was_written_on():
    wrong = []
    for path in our_files():
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if FOREIGN.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.decode('utf-8', 'backslashreplace').strip()}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("text", ["see /wo" + "rk/x", "fa" + "rm-x", "a .li" + "brary"])
def test_foreign_words_are_found(text):
    assert FOREIGN.search(text.encode())


@pytest.mark.parametrize("text", ["/var/wo" + "rk/x", "/overlay/upper:wo" + "rk", "workdir=/a/wo" + "rk"])
def test_overlay_work_folders_are_not_foreign(text):
    assert not FOREIGN.search(text.encode())
