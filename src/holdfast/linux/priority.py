"""How much of the processors a process gets: little while nobody waits for it, as usual when somebody does."""

from __future__ import annotations

import os

_LOWEST = 19


def lower() -> None:
    """Gives this process, and what it starts from now on, the lowest priority (setpriority(2))."""
    os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)


def restore(*pids: int) -> None:
    """Gives this process and others, with all their threads, the usual priority again; needs CAP_SYS_NICE for that.

    Args:
        pids: as /proc has them, which may be of another PID namespace.
    """
    for pid in ("self", *pids):
        for thread in os.listdir(f"/proc/{pid}/task"):
            try:
                os.setpriority(os.PRIO_PROCESS, _number_here(f"/proc/{pid}/task/{thread}/status"), 0)
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has just ended; or stays slow
                continue


def _number_here(status: str) -> int:
    """A thread's number in its own PID namespace, which is ours (proc_pid_status(5), NSpid: the last one)."""
    with open(status) as file:
        return next(int(line.split()[-1]) for line in file if line.startswith("NSpid:"))
