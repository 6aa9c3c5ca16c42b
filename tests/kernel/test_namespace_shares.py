"""What tests/vm/test_shares.py says of pods in machines, as far as it holds for pods in namespaces.

Not: following a file, cache modes and hostile requests are 9p's, devices QEMU's.
"""

from __future__ import annotations

from tests.both_kinds import same_as
from tests.kernel import namespace_pods
from tests.vm import test_shares

data, pod, shared_pod = namespace_pods.FIXTURES
globals().update(
    same_as(
        test_shares,
        "test_gap_a_file_replaced_by_rename_is_still_served",
        "test_a_cache_mode_for_each_share",
        "test_hostile_the_export_itself",
        "test_qemu_cannot_make_devices",
    )
)
