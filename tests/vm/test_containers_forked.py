"""What tests/vm/test_containers.py says of pods, for a fork of one that was booted."""

from __future__ import annotations

from tests.both_kinds import same_as
from tests.vm import other_pods, test_containers

#: They take long, and ask much of streams alone, which a fork has of its own.
LONG = (
    "test_output_and_errors_are_apart_and_complete", "test_output_at_a_terminal_is_complete", "test_many_at_once",
)  # fmt: skip

pod = shared_pod = other_pods.forked
globals().update(same_as(test_containers, *LONG))
