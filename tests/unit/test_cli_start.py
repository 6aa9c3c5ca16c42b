"""What a command reads before it does anything: every module is a millisecond of each start."""

from __future__ import annotations

import subprocess
import sys

from tests import images

#: Prints what has been imported when the command has ended.
PROGRAM = """
import sys
sys.path[:] = {path!r}
from holdfast.cli.main import main
status = main(sys.argv[1:])
there = [name for name, module in sys.modules.items() if type(module).__name__ != "_Later"]
print("imported:", *there, file=sys.stderr)
raise SystemExit(status)
"""
#: Long to import, and not needed to say what is to be run.
SELDOM = ("asyncio", "subprocess", "tarfile", "ssl", "logging", "tempfile", "secrets", "qemu.qmp", "rich")


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(path=sys.path)
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, *argv], capture_output=True, text=True, check=False
    )


def imported(done: subprocess.CompletedProcess[str]) -> list[str]:
    last = done.stderr.splitlines()[-1]
    assert last.startswith("imported:"), done
    return last.split()[1:]


def test_a_plan_is_made_without_what_only_monitors_need(tmp_path):
    bundle = images.make_bundle(tmp_path / "bundle", ["/bin/true"])
    done = run("--root", str(tmp_path / "state"), "--data", str(tmp_path / "data"), "plan", "--bundle", str(bundle))
    assert done.returncode == 0, done
    found = imported(done)
    assert "holdfast.pod.planning" in found
    assert [name for name in SELDOM if name in found] == []


def test_a_module_that_is_imported_later_is_the_real_one():
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from holdfast.cli.main import _Later\n"
        "later = sys.modules['tarfile'] = _Later('tarfile')\n"
        "import tarfile\nassert tarfile is later\n"
        "from tarfile import TarInfo\nassert TarInfo is later.TarInfo\n"
        "import tarfile\nassert tarfile is not later and tarfile.TarInfo is TarInfo"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_has_every_command():
    done = run("--help")
    assert done.returncode == 0
    for command in ("run", "exec", "pod", "image", "template", "volume", "audit", "doctor"):
        assert f"    {command} " in done.stdout


def test_options_for_everywhere_do_not_hide_the_command():
    for words in (["--json", "run", "--help"], ["--root", "ps", "run", "--help"], ["--data=run", "run", "--help"]):
        assert "usage: holdfast run " in run(*words).stdout
    assert "usage: holdfast ps " in run("--root", "run", "ps", "--help").stdout
