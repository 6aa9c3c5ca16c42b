"""What tests/vm/test_mounts.py says of pods, for one that was forked."""

from __future__ import annotations

from tests.both_kinds import same_as
from tests.vm import other_pods, test_mounts

pod = shared_pod = other_pods.forked
globals().update(
    same_as(test_mounts, "test_a_disk_that_a_container_still_uses_stays", "test_a_detach_while_the_guest_is_busy")
)
