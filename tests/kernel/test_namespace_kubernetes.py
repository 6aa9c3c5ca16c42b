"""What tests/vm/test_kubernetes.py says of pods in machines holds for pods in namespaces."""

from __future__ import annotations

from tests.both_kinds import same_as
from tests.kernel import namespace_pods
from tests.vm import test_kubernetes

data, pod, shared_pod = namespace_pods.FIXTURES
globals().update(same_as(test_kubernetes))
