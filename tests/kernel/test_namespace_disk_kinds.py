"""What tests/vm/test_disk_kinds.py says of pods in machines, as far as it holds for pods in namespaces.

Not: formats that QEMU knows; partition tables, which not every host's kernel knows; QEMU's descriptors; crun's order.
"""

from __future__ import annotations

from tests.both_kinds import same_as
from tests.kernel import namespace_pods
from tests.vm import test_disk_kinds

data, pod, shared_pod = namespace_pods.FIXTURES
globals().update(
    same_as(
        test_disk_kinds,
        "test_formats",
        "test_partitions",
        "test_propagation_from_the_guest_to_a_container",
        "test_what_is_deleted_is_given_back_to_the_host",
        "test_attach_only",
        "test_a_format_that_is_said",
    )
)
