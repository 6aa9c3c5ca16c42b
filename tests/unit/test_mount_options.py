"""Mount options: every spelling of read-only, flags and their opposites, propagation, and what is left."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import InvalidInput
from holdfast.linux import syscalls as k
from holdfast.mounts import options

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "given_options",
    [["ro"], ["RO"], ["Ro"], ["rro"], ["readonly"], ["ReadOnly"], ["read-only"], ["ro=true"], ["readonly=1"],
     ["rbind", "ro"], ["ro,nosuid"], "nosuid,ro", ["rw", "ro"], ["ro", "rw"], ["rw=false"]],
)  # fmt: skip
def test_read_only_spellings(given_options: list[str]) -> None:
    assert options.is_read_only(given_options)
    parsed = options.parse(given_options)
    assert parsed.read_only
    assert parsed.data == ()


@pytest.mark.parametrize(
    "given_options",
    [[], ["rw"], ["RW"], ["readonly=false"], ["ro=0"], ["norecovery"], ["errors=remount-ro"], ['context="a,ro"'],
     ["lowerdir=/a\\,ro"], ["readwrite"], ["rrw"]],
)  # fmt: skip
def test_not_read_only(given_options: list[str]) -> None:
    assert not options.is_read_only(given_options)
    assert not options.parse(given_options).read_only


def test_bad_truth_value_names_the_option() -> None:
    with pytest.raises(InvalidInput) as caught:
        options.is_read_only(["ro=maybe"])
    assert caught.value.code == "mount-option"
    assert caught.value.subject == "ro=maybe"


@pytest.mark.parametrize(
    ("given_options", "flags"),
    [
        (["defaults"], 0),
        (["nosuid", "nodev", "noexec"], k.MS_NOSUID | k.MS_NODEV | k.MS_NOEXEC),
        (["nosuid", "suid"], 0),
        (["suid", "nosuid"], k.MS_NOSUID),
        (["bind"], k.MS_BIND),
        (["rbind", "ro"], k.MS_BIND | k.MS_REC | k.MS_RDONLY),
        (["remount", "bind", "noatime"], k.MS_REMOUNT | k.MS_BIND | k.MS_NOATIME),
        (["sync", "async", "dirsync", "lazytime"], k.MS_DIRSYNC | k.MS_LAZYTIME),
        (["relatime", "norelatime", "strictatime"], k.MS_STRICTATIME),
        (["nosymfollow"], k.MS_NOSYMFOLLOW),
    ],
)
def test_flags(given_options: list[str], flags: int) -> None:
    parsed = options.parse(given_options)
    assert (parsed.flags, parsed.propagation, parsed.data) == (flags, (), ())


def test_recursive_flags_are_also_plain_ones() -> None:
    parsed = options.parse(["rbind", "rro", "rnosuid", "nodev"])
    assert parsed.flags == k.MS_BIND | k.MS_REC | k.MS_RDONLY | k.MS_NOSUID | k.MS_NODEV
    assert parsed.recursive == k.MS_RDONLY | k.MS_NOSUID
    assert options.parse(["rnosuid", "suid"]).recursive == 0
    # "relatime" begins with r by chance, not as the recursive spelling of something.
    assert options.parse(["relatime"]).recursive == 0


def test_propagation_keeps_its_order() -> None:
    parsed = options.parse(["rslave", "shared", "ro"])
    assert parsed.propagation == (k.MS_SLAVE | k.MS_REC, k.MS_SHARED)
    assert parsed.flags == k.MS_RDONLY


def test_the_rest_is_data() -> None:
    parsed = options.parse(["size=64k", "nosuid", "lowerdir=a:b,upperdir=c", "defaults", "x-systemd.automount", "acl"])
    assert parsed.data == ("size=64k", "lowerdir=a:b", "upperdir=c", "acl")
    assert parsed.data_text == "size=64k,lowerdir=a:b,upperdir=c,acl"
    assert options.parse(['context="u:r:t:c1,c2"', "ro"]).data == ('context="u:r:t:c1,c2"',)


@given(st.lists(st.sampled_from([*options.FLAG_NAMES, *options.PROPAGATION_NAMES, "ro", "rw", "rbind", "size=1", "a"])))
def test_how_options_are_listed_does_not_matter(words: list[str]) -> None:
    one, many = options.parse(",".join(words)), options.parse(words)
    assert repr(one) == repr(many)
    assert many.read_only == options.is_read_only(words) == ("ro" in words)


@given(st.lists(st.text(max_size=12), max_size=6))
def test_any_text_is_sorted_or_refused(words: list[str]) -> None:
    with contextlib.suppress(InvalidInput):
        assert set(options.parse(words).data) <= set(options.split(words))


def test_light_enough_for_the_guest() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); import holdfast.mounts.options;"
        "print(*{'typing', 'dataclasses', 're', 'enum', 'contextlib', 'json'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
