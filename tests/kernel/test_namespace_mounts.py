"""What tests/vm/test_mounts.py says of pods in machines, as far as it holds for pods in namespaces.

Not: formats that QEMU knows; who may mount undoes read-only on the host's kernel.
"""

from __future__ import annotations

from tests.both_kinds import same_as
from tests.kernel import namespace_pods
from tests.vm import test_mounts

data, pod, shared_pod = namespace_pods.FIXTURES
globals().update(
    same_as(
        test_mounts,
        "test_qcow2",
        "test_a_read_only_share_withstands_root_in_the_guest",
    )
)
