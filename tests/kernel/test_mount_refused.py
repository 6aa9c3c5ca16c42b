"""An old kernel, played by a filter: the library does the same without the calls that came after Linux 5.1.

A child refuses itself the calls (seccomp(2), ENOSYS; of ``ioctl`` only LOOP_CONFIGURE, with EINVAL) and runs the tests
of the library there.  Refused in groups, since every version of Linux has some and not others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
#: What is run without the calls of a version and of all later ones: all, and what has a way of its own for these.
FILES = {
    "5.2": ("test_mount_kinds.py", "test_mount_release.py", "test_mount_records.py", "test_layers.py"),
    "5.12": ("test_mount_kinds.py",),
    "6.8": ("test_mount_release.py",),
}
#: What each version of Linux brought; openat2(2) is not among them, for safe paths have no substitute.
CALLS = {
    "5.2": {"open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432},
    "5.12": {"mount_setattr": 442},
    "6.8": {"statmount": 457, "listmount": 458},
}

PROGRAM = """
import ctypes, errno, struct, sys
ALLOW, REFUSE, IOCTL, LOOP_CONFIGURE = 0x7FFF0000, 0x00050000, 16, 0x4C0A
def refuse(numbers, loop):
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    code = [(load, 0, 0, 0)]  # seccomp_data.nr
    for number in numbers:
        code += [(equal, 0, 1, number), (give, 0, 0, REFUSE | errno.ENOSYS)]
    if loop:
        code += [(equal, 0, 3, IOCTL), (load, 0, 0, 24), (equal, 0, 1, LOOP_CONFIGURE)]  # args[1], its lower half
        code += [(give, 0, 0, REFUSE | errno.EINVAL)]
    code += [(give, 0, 0, ALLOW)]
    body = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(body)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    for arguments in ((38, 1, 0, 0, 0), (22, 2, ctypes.addressof(program), 0, 0)):  # NO_NEW_PRIVS, SET_SECCOMP
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")
refuse([int(text) for text in sys.argv[1].split(",")], sys.argv[2] == "loop")
"""


@pytest.mark.timeout(300)  # some 200 tests
@pytest.mark.parametrize("since", CALLS)
def test_without_the_calls_of(since, tmp_path):
    later = list(CALLS)[list(CALLS).index(since) :]
    calls = {name: number for version in later for name, number in CALLS[version].items()}
    check = (
        "from holdfast.mounts import features\n"
        f"wanted = {since!r}\n"
        "absent = [f.name for f in features.ALL if not f]\n"
        "assert 'listmount, statmount' in absent, absent\n"
        "assert ('open_tree, move_mount' in absent) == (wanted == '5.2'), absent\n"
        "assert ('mount_setattr' in absent) == (wanted != '6.8'), absent\n"
    )
    run = (
        "import os, pytest\n"
        f"os.environ.pop('PYTEST_CURRENT_TEST', None); os.environ['PYTEST_DEBUG_TEMPROOT'] = {str(tmp_path)!r}\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:xdist', *{[str(HERE / f) for f in FILES[since]]!r}]))\n"
    )
    numbers = ",".join(str(number) for number in calls.values())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + check + run, numbers, "loop" if since == "5.2" else ""],
        cwd=HERE.parents[1], env=os.environ | {"COLUMNS": "120"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(f"without {', '.join(calls)}:\n{done.stdout[-20000:]}{done.stderr[-2000:]}", pytrace=False)
    assert " passed" in done.stdout
