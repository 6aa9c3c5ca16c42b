"""What tests/vm/test_containers.py says of pods, for one that was booted."""

from __future__ import annotations

from tests.both_kinds import same_as
from tests.vm import other_pods, test_containers

pod = shared_pod = other_pods.booted
globals().update(same_as(test_containers))
