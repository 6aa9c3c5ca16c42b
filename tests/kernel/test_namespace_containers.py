"""What tests/vm/test_containers.py says of pods in machines, as far as it holds for pods in namespaces.

Not: who may mount undoes read-only on the host's kernel.
"""

from __future__ import annotations

from tests.both_kinds import same_as
from tests.kernel import namespace_pods
from tests.vm import test_containers

data, pod, shared_pod = namespace_pods.FIXTURES
globals().update(
    same_as(
        test_containers,
        "test_a_bundle_over_9p_is_read_only_when_it_says_so",
    )
)
