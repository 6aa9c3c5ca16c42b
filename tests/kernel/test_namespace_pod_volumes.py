"""What tests/vm/test_pod_volumes.py says of pods in machines, as far as it holds for pods in namespaces.

Not: a path of the guest's own, which would be the host's; memory for ``/tmp`` that nobody asked for.
"""

from __future__ import annotations

from tests.both_kinds import same_as
from tests.kernel import namespace_pods
from tests.vm import test_pod_volumes

data, pod, shared_pod = namespace_pods.FIXTURES
globals().update(same_as(test_pod_volumes, "test_a_path_of_the_guest", "test_tmp"))
