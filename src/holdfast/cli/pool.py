"""``pool``: keeps pods ready, as long as it runs."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from holdfast.pod.launch import start_monitor
from holdfast.pod.messages import PodRequest
from holdfast.pod.pool import Pool

if TYPE_CHECKING:
    from holdfast.cli.options import CommandLine, PoolOptions
    from holdfast.cli.output import Output


def pool(command: PoolOptions, line: CommandLine, output: Output) -> int:
    """``pool``: returns when it is told to end (SIGINT, SIGTERM), and those that nobody has taken are gone."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    before = {number: signal.signal(number, lambda _number, _frame: None) for number in (signal.SIGINT, signal.SIGTERM)}
    wakeup = signal.set_wakeup_fd(writer)
    try:
        request = PodRequest("", line.root, line.data, memory_bytes=command.memory_bytes, cpus=command.cpus)
        with Pool(request, command.size, start_monitor, output.say) as kept:
            output.say(f"keeping {command.size} pods ready")
            kept.keep(reader)
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
    return 0
