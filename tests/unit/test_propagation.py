"""Propagation of mounts, as crun must be told it."""

from __future__ import annotations

import copy

import pytest

from holdfast.guest import propagation


def spec(*options, **linux):
    mounts = [{"destination": f"/{n}", "options": list(words)} for n, words in enumerate(options)]
    return {"mounts": mounts, "linux": linux}


@pytest.mark.parametrize(
    "before",
    [
        spec(["rbind"], ["nosuid"]),
        spec(["rbind", "rprivate"], ["bind", "private"]),
        spec(["rbind", "rshared"], ["rbind"], rootfsPropagation="rslave"),
        {"mounts": None, "linux": {}},
        {"linux": {}},
    ],
)
def test_what_crun_does_anyhow_is_not_said(before):
    after = copy.deepcopy(before)
    propagation.keep(after)
    assert after == before


@pytest.mark.parametrize("word", ["shared", "rshared", "slave", "rslave", "unbindable", "runbindable"])
def test_what_was_asked_for_is_kept_and_others_stay_private(word):
    after = spec(["rbind", word], ["rbind", "ro"], ["bind", "private"], ["nosuid"], [word])
    propagation.keep(after)
    assert after["linux"] == {"rootfsPropagation": "private"}
    found = [mount["options"] for mount in after["mounts"]]
    assert found == [["rbind", word], ["rbind", "ro", "rprivate"], ["bind", "private"], ["nosuid"], [word]]
