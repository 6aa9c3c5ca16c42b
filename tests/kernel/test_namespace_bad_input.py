"""What tests/vm/test_bad_input.py says of pods in machines, as far as it holds for pods in namespaces.

Not: images of other formats are for QEMU.
"""

from __future__ import annotations

from tests.both_kinds import same_as
from tests.kernel import namespace_pods
from tests.vm import test_bad_input

data, pod, shared_pod = namespace_pods.FIXTURES
globals().update(
    same_as(
        test_bad_input,
        "test_sources:truncated_qcow2",
    )
)
