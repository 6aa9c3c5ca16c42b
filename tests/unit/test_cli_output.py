"""What a command prints: tables, JSON, errors; for people, pipes and programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.cli import main as cli
from holdfast.cli import output as shown
from holdfast.cli.output import Output
from holdfast.errors import HoldfastError, InUse, NotFound, NotReleased

SOURCES = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def terminal(monkeypatch, capsys):
    """stdout and stderr are taken for terminals."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(shown, "_is_terminal", lambda _stream: True)
    return capsys


def test_table_for_a_pipe(capsys):
    Output().table(("A", "LONGER"), [("x", ""), ("yyyy", "two\nlines")])
    assert capsys.readouterr().out == "A     LONGER\nx     -\nyyyy  two lines\n"


def test_table_for_a_terminal_has_a_bold_head(terminal):
    Output().table(("A",), [("x",)])
    assert terminal.readouterr().out == "\x1b[1mA\x1b[0m\nx\n"


@pytest.mark.parametrize("setting", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_can_be_plain(terminal, monkeypatch, setting):
    monkeypatch.setenv(*setting)
    Output().error(NotFound("find pod", subject="x"))
    assert terminal.readouterr().err == "holdfast: find pod x\n"


def test_fields_leave_out_what_is_empty(capsys):
    Output().fields((("name", "x"), ("why", ""), ("files", "a\nb"), ("cpus", 0)))
    assert capsys.readouterr().out == "name:  x\nfiles: a\n       b\ncpus:  0\n"


def test_what_drives_a_terminal_is_shown_as_text(capsys):
    Output().error(NotFound("find pod", subject="\x1b[2Jx\x07", why="a\x9bb"))
    assert capsys.readouterr().err == "holdfast: find pod \\x1b[2Jx\\x07: a\\x9bb\n"


def test_error_with_all_parts(capsys):
    inner = InUse("unmount", subject="/d", why="busy", hint="end it")
    error = NotReleased("release storage", subject="c1", why="first line\nsecond", hint="again", causes=[inner])
    Output().error(error)
    assert capsys.readouterr() == (
        "",
        "holdfast: release storage c1: first line\n    second\n"
        "  hint: again\n  also: unmount /d: busy\n    hint: end it\n",
    )


def test_error_on_a_terminal_has_colour(terminal):
    Output().error(NotFound("find pod", subject="x", hint="look"))
    assert terminal.readouterr().err == (
        "\x1b[31;1mholdfast: \x1b[0m\x1b[1mfind pod x\x1b[0m\n  \x1b[36mhint: \x1b[0mlook\n"
    )


def test_error_for_programs(capsys):
    error = NotFound("find pod", subject="x", code="pod-not-found")
    Output(json=True).error(error)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": error.as_dict()}
    assert err == ""


def test_error_for_programs_leaves_the_container_its_stdout(capsys):
    Output(json=True, container_output=True).error(NotFound("find pod"))
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["error"]["kind"] == "NotFound"


def test_json_of_a_path_that_is_no_utf8():
    assert json.loads(shown.encode({"path": os.fsdecode(b"/a\xff")})) == {"path": "/a\udcff"}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (10 << 30, "10 GiB"), (1 << 60, "1048576 TiB")],
)
def test_sizes(count, text):
    assert shown.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0s"), (0, "0s"), (59, "59s"), (60, "1m"), (7199, "1h"), (90000, "1d")]
)
def test_ages(seconds, text):
    assert shown.age(0, seconds * 10**9) == text


def test_long_texts_are_cut():
    assert shown.shorten("abcd", 4) == "abcd"
    assert shown.shorten("abcde", 4) == "abc…"


# -- the program's end --------------------------------------------------------------------------


def command_fails_with(monkeypatch, error: BaseException) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_find", lambda _line: fail)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (HoldfastError("x"), 125),
        (ValueError("x"), 125),
        (OSError(2, "No such file"), 125),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_status(monkeypatch, capsys, error, status):
    command_fails_with(monkeypatch, error)
    assert cli.main(["ps"]) == status
    assert "Traceback" not in capsys.readouterr().err


def test_a_fault_of_ours_says_how_to_learn_more(monkeypatch, capsys):
    command_fails_with(monkeypatch, ValueError("odd"))
    cli.main(["ps"])
    text = capsys.readouterr().err
    assert text.startswith("holdfast: unexpected failure: ValueError: odd")
    assert text.endswith("\n  hint: this is a fault of Holdfast; --debug says where\n")
    cli.main(["--debug", "ps"])
    assert "Traceback" in capsys.readouterr().err


def test_a_wrong_command_line_is_an_error_like_any_other(capsys):
    assert cli.main(["nonsense", "--json"]) == 125
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


def test_every_command_has_a_function():
    from importlib import import_module

    from holdfast.cli import options

    records = {name for name in vars(options) if name.endswith("Options") and name != "SandboxOptions"}
    assert set(cli.COMMANDS) == records
    for module, function in cli.COMMANDS.values():
        assert callable(getattr(import_module(f"holdfast.cli.{module}"), function))


def holdfast(*argv: str, **options):
    code = f"import sys; sys.path[:] = {sys.path!r}; from holdfast.cli.main import main; raise SystemExit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_version_and_help():
    from holdfast import __version__

    assert holdfast("--version").stdout == f"holdfast {__version__}\n"
    done = holdfast("run", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--mount" in done.stdout


def test_a_reader_who_has_gone_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    code = f"import sys; sys.path[:] = {sys.path!r}; from holdfast.cli.main import main; raise SystemExit(main())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, "doctor", "--json"],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_closed_descriptors_are_not_given_to_anything_else(state_root):
    done = holdfast("ps", preexec_fn=lambda: [os.close(fd) for fd in (0, 1, 2)])
    assert done.returncode == 0


def test_the_program_imports_nothing_to_begin_with():
    code = "import sys; before = set(sys.modules); import holdfast.cli.main; print(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(SOURCES)!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(done.stdout.split()) >= {"holdfast.cli.main"}
    assert not {"argparse", "msgspec", "holdfast.errors"} & set(done.stdout.split())
