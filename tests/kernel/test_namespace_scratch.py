"""What tests/vm/test_scratch.py says of pods in machines, as far as it holds for pods in namespaces.

Not: encryption; growing, which needs CAP_SYS_RESOURCE on the host (see test_namespace.py).
"""

from __future__ import annotations

from tests.both_kinds import same_as
from tests.kernel import namespace_pods
from tests.vm import test_scratch

data, pod, shared_pod = namespace_pods.FIXTURES
globals().update(
    same_as(
        test_scratch,
        "test_the_host_s_file_holds_no_plain_text",
        "test_encrypted_by_annotation_and_closed_at_the_end",
        "test_its_size_is_a_limit:True",
        "test_one_disk_with_a_folder_for_each:True",
        "test_shared_by_annotation_and_apart_from_one_of_another_kind",
        "test_it_grows_while_it_is_written_to",
        "test_what_cannot_grow",
    )
)
