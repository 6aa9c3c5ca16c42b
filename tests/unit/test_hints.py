"""Mount hints: read whole and in a fixed order, compared as paths, options equal or stricter."""

from __future__ import annotations

from itertools import permutations, product

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import InvalidInput, Unsupported
from holdfast.spec import hint_options
from holdfast.spec.hints import (
    GVISOR,
    GVISOR_2019,
    HOLDFAST,
    PREFIXES,
    Hint,
    backing,
    check_compatible,
    check_restated,
    check_sources,
    match,
    parse_hints,
    parse_key,
    render,
)
from holdfast.spec.runtime import Mount

BASE = "/bundle"
DATA = Hint("data", "/vol/data", "tmpfs", "pod")


def keys(prefix: str, name: str = "data", **fields: str) -> dict[str, str]:
    return {f"{prefix}{name}{prefix[-1]}{field}": value for field, value in fields.items()}


def whole(name: str = "data", prefix: str = GVISOR, **fields: str) -> dict[str, str]:
    return keys(prefix, name, **{"source": "/vol/data", "type": "tmpfs", "share": "pod", **fields})


def bind(source: str, *options: str) -> Mount:
    return Mount("/d", "bind", source, options or ("rbind",))


def refused(annotations: dict[str, str], *, strict: bool = True) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        parse_hints(annotations, base=BASE, strict=strict)
    return caught.value


# Keys


@pytest.mark.parametrize("prefix", PREFIXES)
def test_each_style_of_key(prefix: str) -> None:
    parsed = parse_hints(whole(prefix=prefix, options="noexec,size=1m"))
    assert parsed.hints == (Hint("data", "/vol/data", "tmpfs", "pod", ("noexec", "size=1m")),)
    assert not parsed.warnings


@pytest.mark.parametrize(
    "key",
    [
        "gvisor.dev/spec/mountX/data/source",
        "gvisor.dev/spec/mount",
        "dev.gvisor.spec.mountX.data.source",
        "dev.gvisor.spec.mount",
        "dev.gvisor.spec.rootfs.source",
        "dev.holdfast.mounts.data.source",
        "dev.holdfast.verity",
        "x.dev.gvisor.spec.mount.data.source",
    ],
)
def test_near_miss_prefix_is_not_ours(key: str) -> None:
    """Defect of the reference: the prefix was compared without its last character."""
    assert parse_key(key) is None
    assert parse_hints({key: "anything"}).hints == ()


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("dev.gvisor.spec.mount.data", "hint-key"),
        ("dev.gvisor.spec.mount.data.", "hint-key"),
        ("dev.gvisor.spec.mount.da.ta.source", "hint-key"),
        ("gvisor.dev/spec/mount/data", "hint-key"),
        ("gvisor.dev/spec/mount/data/source/x", "hint-key"),
        ("dev.holdfast.mount.a.b.c", "hint-key"),
        ("dev.gvisor.spec.mount..source", "hint-name"),
        ("gvisor.dev/spec/mount//source", "hint-name"),
        ("gvisor.dev/spec/mount/./source", "hint-name"),
        ("gvisor.dev/spec/mount/../source", "hint-name"),
        ("dev.gvisor.spec.mount.a/b.source", "hint-name"),
        ("dev.gvisor.spec.mount.a b.source", "hint-name"),
        ("dev.gvisor.spec.mount.a\0.source", "hint-name"),
        (f"dev.gvisor.spec.mount.{'a' * 254}.source", "hint-name"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_bad_key_is_an_error_always(key: str, code: str, strict: bool) -> None:
    error = refused({key: "VALUE"}, strict=strict)
    assert error.code == code
    assert f"{key}=VALUE" in str(error)


def test_name_with_a_dot_in_the_style_that_allows_it() -> None:
    assert parse_hints(whole("a.b", GVISOR_2019)).hints[0].name == "a.b"


def test_name_of_dots_is_refused() -> None:
    """Defect of the reference: ``path.Clean("..") == ".."``, so these passed for names."""
    for name in (".", ".."):
        assert refused(whole(name, GVISOR_2019)).code == "hint-name"


def test_styles_may_say_the_same_together_but_not_contradict() -> None:
    parts = keys(GVISOR, source="/vol/data") | keys(GVISOR_2019, type="tmpfs") | keys(HOLDFAST, share="pod")
    assert parse_hints(parts).hints == (DATA,)
    assert parse_hints(whole() | whole(prefix=HOLDFAST)).hints == (DATA,)
    error = refused(whole() | keys(HOLDFAST, share="container"), strict=False)
    assert error.code == "hint-conflict"
    assert "dev.gvisor.spec.mount.data.share=pod" in str(error)
    assert "dev.holdfast.mount.data.share=container" in str(error)


# Fields


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"source": ""}, "hint-source", ".source=: it is empty"),
        ({"source": "/a\0b"}, "hint-source", "NUL"),
        ({"type": "ext4"}, "hint-type", ".type=ext4: the type is one of tmpfs, bind"),
        ({"type": "TMPFS"}, "hint-type", ".type=TMPFS"),
        ({"type": ""}, "hint-type", ".type="),
        ({"share": "everyone"}, "hint-share", ".share=everyone: the share is one of container, pod, shared"),
        ({"lifecycle": "pod"}, "hint-field", ".lifecycle=pod: there is no field 'lifecycle'"),
        ({"directfs": "maybe"}, "hint-field", ".directfs=maybe"),
        ({"options": "ro,shared"}, "hint-options", ".options=ro,shared: 'shared' is not supported"),
        ({"options": "rshared"}, "hint-options", "'rshared' is not supported"),
        ({"options": "ro=maybe"}, "hint-options", "'ro=maybe'"),
        ({"options": "private,rslave"}, "hint-options", "a mount is either private or slave"),
        ({"options": "size=big"}, "hint-options", "'size=big' is not a size"),
        ({"options": "size=0"}, "hint-options", "'size=0' is too small"),
        ({"options": "size=1=2"}, "hint-options", "'size=1=2' is not a size"),
        ({"options": "size=120%"}, "hint-options", "'size=120%' is not from 1% to 100%"),
        ({"options": "size"}, "hint-options", "'size' is not a size"),
        ({"options": "mode=1999"}, "hint-options", "'mode=1999' is not an octal mode"),
        ({"options": "mode=17777"}, "hint-options", "'mode=17777'"),
        ({"options": "uid=root"}, "hint-options", "'uid=root'"),
        ({"options": "uid=4294967295"}, "hint-options", "'uid=4294967295'"),
        ({"options": "gid=1k"}, "hint-options", "'gid=1k'"),
        ({"options": "cache=loose"}, "hint-options", "'cache=loose' is not for type tmpfs"),
        ({"type": "bind", "options": "size=1m"}, "hint-options", "'size=1m' is not for type bind"),
        ({"type": "bind", "options": "cache=much"}, "hint-options", "'cache=much' is none of none, mmap, loose"),
    ],
)
def test_bad_field_strictly_and_leniently(fields: dict[str, str], code: str, said: str) -> None:
    annotations = whole(**fields)
    error = refused(annotations)
    assert error.code == code
    assert said in str(error)
    assert GVISOR + "data." in str(error)
    parsed = parse_hints(annotations, base=BASE, strict=False)
    assert any(said.partition(": ")[0] in warning for warning in parsed.warnings)
    # A hint that lacks a field goes, one with an option or a field too many stays.
    assert len(parsed.hints) == (code in ("hint-options", "hint-field"))


def test_lenient_keeps_unknown_options_and_drops_bad_ones() -> None:
    assert "'frobnicate' is not a known mount option" in str(refused(whole(options="ro,frobnicate")))
    parsed = parse_hints(whole(options="ro,shared,frobnicate,size=big,noexec"), strict=False)
    assert parsed.hints[0].options == ("ro", "frobnicate", "noexec")
    assert len(parsed.warnings) == 2


#: Section 2.7 of the reference.
VOCABULARY = [
    "acl", "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "noexec", "iversion", "loud",
    "mand", "noacl", "noatime", "nodev", "nodiratime", "noiversion", "nomand", "norelatime", "nostrictatime",
    "nosuid", "rbind", "relatime", "remount", "ro", "rw", "silent", "strictatime", "suid", "sync", "private",
    "rprivate", "slave", "rslave", "unbindable", "runbindable",
]  # fmt: skip


@pytest.mark.parametrize("word", VOCABULARY)
def test_vocabulary_of_the_reference(word: str) -> None:
    assert parse_hints(whole(options=word)).hints[0].options == (word,)


@pytest.mark.parametrize("missing", ["source", "type", "share"])
def test_missing_field(missing: str) -> None:
    annotations = whole()
    del annotations[f"{GVISOR}data.{missing}"]
    error = refused(annotations)
    assert error.code == "hint-incomplete"
    assert f"hint data: {missing} is missing" in str(error)
    parsed = parse_hints(annotations, strict=False)
    assert parsed.hints == ()
    assert f"{missing} is missing" in parsed.warnings[0]


def test_wrong_field_is_not_told_a_second_time_as_missing() -> None:
    error = refused(whole(type="ext4"))
    assert error.code == "hint-type"
    assert not error.causes


def test_directfs_is_of_another_runtime() -> None:
    assert parse_hints(whole(directfs="off")).hints == (DATA,)
    assert refused(whole(prefix=HOLDFAST, directfs="off")).code == "hint-field"


def test_all_faults_are_told_at_once() -> None:
    error = refused(whole(type="ext4") | whole("other", share="x", source="/o") | {f"{GVISOR}bad": ""})
    assert [error.code, *(cause.code for cause in error.causes)] == ["hint-key", "hint-type", "hint-share"]
    assert "type=ext4" in str(error)
    assert "share=x" in str(error)


FAULTY = whole(type="ext4") | whole("b", share="x") | whole("c", GVISOR_2019) | {GVISOR + "z": "", GVISOR + "y": ""}


@given(st.permutations(list(FAULTY.items())))
def test_what_is_reported_does_not_depend_on_the_order_of_the_map(items: list[tuple[str, str]]) -> None:
    """Defect of the reference: with several faults the one that was told varied from run to run."""
    again = refused(dict(sorted(items)))
    assert str(refused(dict(items))) == str(again)


@given(
    st.permutations(
        list((whole() | whole("b", source="/b", options="ro") | whole("a", GVISOR_2019, source="/a")).items())
    )
)
def test_hints_do_not_depend_on_the_order_of_the_map(items: list[tuple[str, str]]) -> None:
    assert [hint.name for hint in parse_hints(dict(items)).hints] == ["a", "b", "data"]


# Sources


@pytest.mark.parametrize("source", ["/vol/data/", "/vol//data", "/vol/./data", "/vol/x/../data", "//vol/data"])
def test_source_is_a_path_not_a_string(source: str) -> None:
    """Defect of the reference: compared as strings, these were silently not shared."""
    assert parse_hints(whole(source=source)).hints == (DATA,)
    assert match([DATA], bind(source)) == (DATA, "")


def test_relative_source_is_in_the_bundle() -> None:
    (hint,) = parse_hints(whole(source="./vol/../data"), base=BASE).hints
    assert hint.source == "/bundle/data"
    assert match([hint], bind("data"), BASE) == (hint, "")
    assert match([hint], bind("/bundle/data")) == (hint, "")
    assert match([hint], bind("data")) is None
    with pytest.raises(InvalidInput) as caught:
        parse_hints(whole(source="data"))
    assert caught.value.code == "hint-source"


@pytest.mark.parametrize("strict", [True, False])
def test_one_source_of_two_hints_is_refused_as_a_path(strict: bool) -> None:
    error = refused(whole() | whole("twin", source="/vol/x/../data/"), strict=strict)
    assert error.code == "hint-duplicate-source"
    assert "/vol/data" in str(error)
    assert "both data and twin" in str(error)


def test_sources_put_in_place_of_links_are_compared_again() -> None:
    check_sources([DATA, Hint("b", "/b", "bind", "pod")])
    with pytest.raises(InvalidInput, match="both data and b"):
        check_sources([DATA, Hint("b", "/vol/data", "bind", "pod")])


def test_sub_path_of_a_hinted_source() -> None:
    """Defect of the reference: a folder of a shared volume was silently not shared."""
    assert match([DATA], bind("/vol/data/a/b/")) == (DATA, "a/b")
    assert match([DATA], bind("/vol/data/../database")) is None
    assert match([DATA], bind("/vol/database")) is None
    assert match([DATA], bind("/vol")) is None


def test_innermost_of_nested_hints() -> None:
    outer, inner = Hint("outer", "/vol", "bind", "pod"), Hint("inner", "/vol/data", "tmpfs", "pod")
    for hints in permutations([outer, inner]):
        assert match(hints, bind("/vol/data/x")) == (inner, "x")
        assert match(hints, bind("/vol/dat")) == (outer, "dat")
    assert match([Hint("root", "/", "bind", "pod")], bind("/etc")) == (Hint("root", "/", "bind", "pod"), "etc")


@pytest.mark.parametrize(
    ("mount", "found"),
    [
        (Mount("/d", "tmpfs", "/vol/data"), True),
        (Mount("/d", "none", "/vol/data", ("bind",)), True),
        (Mount("/d", "", "/vol/data", ("rbind", "ro")), True),
        (Mount("/d", "virtual-disk", "/vol/data"), False),
        (Mount("/d", "proc", "/vol/data"), False),
        (Mount("/d", "bind", ""), False),
        (Mount("/d", "bind", "/vol/da\0ta"), False),
    ],
)
def test_only_binds_and_tmpfs_are_shared(mount: Mount, found: bool) -> None:
    assert (match([DATA], mount) is not None) == found


def test_tmpfs_whose_source_is_a_mere_word() -> None:
    hints = parse_hints(whole(source="vol") | whole("t", source="tmpfs") | whole("b", source="."), base=BASE).hints
    by_name = {hint.name: hint for hint in hints}
    assert match(hints, Mount("/d", "tmpfs", "vol"), BASE) == (by_name["data"], "")
    # What every other tmpfs says is no name, and no word is a path below a folder.
    assert match(hints, Mount("/d", "tmpfs", "tmpfs"), BASE) is None
    assert match(hints, Mount("/d", "tmpfs", "other"), BASE) is None


def test_kubelet_subpath_of_memory_is_refused_not_silently_apart() -> None:
    """Defect of the reference: a ``volume-subpaths`` source was not recognised: the containers saw different files."""
    pod = "/var/lib/kubelet/pods/uid"
    hint = Hint("v", f"{pod}/volumes/kubernetes.io~empty-dir/v", "tmpfs", "pod")
    with pytest.raises(Unsupported, match="part of volume v") as caught:
        match([hint], bind(f"{pod}/volume-subpaths/v/app/0"))
    assert caught.value.code == "hint-subpath"
    assert match([hint], bind("/var/lib/kubelet/pods/other/volume-subpaths/v/app/0")) is None
    assert match([hint], bind(f"{pod}/volume-subpaths/w/app/0")) is None
    assert match([msgspec.structs.replace(hint, kind="bind")], bind(f"{pod}/volume-subpaths/v/app/0")) is None


# Which are shared


@pytest.mark.parametrize(
    ("kind", "share", "master", "exclusive"),
    [
        ("tmpfs", "container", True, True),
        ("tmpfs", "pod", True, True),
        ("tmpfs", "shared", False, False),
        ("bind", "container", True, True),
        ("bind", "pod", True, True),
        ("bind", "shared", True, False),
    ],
)
def test_which_hints_have_a_master(kind: str, share: str, master: bool, exclusive: bool) -> None:
    """Defects of the reference: masters were made of all hints, but only those of a tmpfs could be shared."""
    (hint,) = parse_hints(whole(type=kind, share=share)).hints
    assert (hint.has_master, hint.exclusive) == (master, exclusive)


def test_backing() -> None:
    host = Hint("h", "/vol/data", "bind", "shared")
    assert backing(DATA, Mount("/d", "tmpfs", "/vol/data")) == "memory"
    assert backing(DATA, bind("/vol/data")) == "disk"
    assert backing(host, bind("/vol/data")) == "share"
    assert backing(host, Mount("/d", "tmpfs", "/vol/data")) == "share"


# Options


@pytest.mark.parametrize("options", ["", None])
def test_no_options_and_empty_options_are_the_same(options: str | None) -> None:
    annotations = whole() if options is None else whole(options=options)
    assert parse_hints(annotations).hints == (DATA,)


def test_each_option_once_the_later_holds() -> None:
    """Defect of the reference: a word said twice made equal lists differ."""
    assert parse_hints(whole(options="exec,ro,noexec,exec,ro")).hints[0].options == ("noexec", "exec", "ro")
    check_compatible(Hint("d", "/d", "tmpfs", "pod", ("ro", "noexec")), ["noexec", "ro", "ro"], exact=True)


def test_options_for_the_master() -> None:
    """Defect of the reference: a tmpfs had no limit."""
    (hint,) = parse_hints(whole(options="rbind,rw,defaults,remount,acl,x-a.b,size=1.5k,mode=01777,uid=07,nosuid")).hints
    assert hint.master_options == ("rw", "size=1536", "mode=1777", "uid=7", "nosuid")
    assert hint.size_bytes == 1536
    (percent,) = parse_hints(whole(options="size=050%,nr_inodes=2k")).hints
    assert percent.master_options == ("size=50%", "nr_inodes=2048")
    assert percent.size_bytes == 0
    assert (DATA.size_bytes, DATA.master_options) == (0, ())


RESTRICTIONS = ["ro", "noexec", "noatime", "nosuid", "nodev"]


@pytest.mark.parametrize(("name", "given"), [*product(RESTRICTIONS, [(), ("rw",), ("relatime", "rbind")])])
def test_container_may_be_stricter_never_less(name: str, given: tuple[str, ...]) -> None:
    check_compatible(DATA, [name, *given])
    strict = msgspec.structs.replace(DATA, options=(name,))
    check_compatible(strict, [name, *given])
    with pytest.raises(InvalidInput) as caught:
        check_compatible(strict, given, subject="mounts[1]")
    assert caught.value.code == "hint-less-strict"
    assert f"mounts[1]: hint data has {name}, the container's mount does not" in str(caught.value)


def test_read_only_hint_for_a_container_that_does_not_say() -> None:
    with pytest.raises(InvalidInput, match="has ro,"):
        check_compatible(msgspec.structs.replace(DATA, options=("ro",)), [])


def test_differences_without_effect_are_none() -> None:
    """Defect of the reference: nosuid, relatime, or the order of the words made a pod fail."""
    hint = msgspec.structs.replace(DATA, options=("rw", "relatime", "size=1m", "noatime"))
    check_compatible(hint, ["noatime", "bind", "rprivate", "nosuid", "rnoexec", "size=1024k", "tmpcopyup", "whatever"])
    with pytest.raises(InvalidInput) as caught:
        check_compatible(hint, ["noatime", "rw", "relatime"], exact=True)
    assert caught.value.code == "hint-options-differ"
    assert (
        "hint data has the options noatime,relatime,rw,size=1m, the container's mount has noatime,relatime,rw"
        in str(caught.value)
    )
    check_compatible(hint, ["noatime,size=1m", "rw", "relatime"], exact=True)


@pytest.mark.parametrize(
    ("hint", "container", "said"),
    [
        (("size=1m",), "size=2m", "wants size 2097152, hint data 1048576"),
        (("size=50%",), "size=2m", "wants size 2097152, hint data 50%"),
        ((), "size=2m", "wants size 2097152, hint data does not say"),
        (("mode=1777",), "mode=700", "wants mode 700, hint data 1777"),
        (("uid=1",), "uid=0", "wants uid 0, hint data 1"),
        (("gid=1",), "gid=2", "wants gid 2, hint data 1"),
        (("nr_inodes=1k",), "nr_inodes=1k", ""),
        (("mode=01777",), "mode=1777", ""),
        (("size=50%",), "size=50%", ""),
    ],
)
def test_what_is_of_the_whole_file_system_is_not_silently_ignored(
    hint: tuple[str, ...], container: str, said: str
) -> None:
    ours = msgspec.structs.replace(DATA, options=hint)
    check_compatible(ours, [])
    if not said:
        check_compatible(ours, [container])
        return
    with pytest.raises(InvalidInput) as caught:
        check_compatible(ours, [container])
    assert caught.value.code == "hint-options-conflict"
    assert said in str(caught.value)


def test_cache_of_a_bind_is_the_masters() -> None:
    hint = Hint("b", "/b", "bind", "pod", ("cache=none",))
    check_compatible(hint, ["rbind", "cache=none"])
    with pytest.raises(InvalidInput, match="wants cache loose, hint b none"):
        check_compatible(hint, ["rbind", "cache=loose"])


def test_unreadable_value_of_the_container() -> None:
    with pytest.raises(InvalidInput) as caught:
        check_compatible(DATA, ["mode=rwx"])
    assert caught.value.code == "mount-option"


WORDS = st.lists(
    st.sampled_from([*RESTRICTIONS, "rw", "exec", "atime", "suid", "dev", "rbind", "relatime", "size=1m", "mode=700"]),
    max_size=8,
)


def compatible(hint: Hint, options: list[str]) -> bool:
    try:
        check_compatible(hint, options)
    except InvalidInput:
        return False
    return True


@given(WORDS, WORDS, st.sampled_from(RESTRICTIONS))
def test_compatible_is_monotone(master: list[str], container: list[str], more: str) -> None:
    hint = Hint("d", "/d", "tmpfs", "pod", hint_options.unique(master))
    stricter = Hint("d", "/d", "tmpfs", "pod", hint_options.unique([*master, more]))
    if compatible(hint, container):
        assert compatible(hint, [*container, more])
    if compatible(stricter, container):
        assert compatible(hint, container)
    assert compatible(hint, list(hint.options))


@given(WORDS)
def test_once_each_changes_nothing(words: list[str]) -> None:
    assert hint_options.terms(hint_options.unique(words)) == hint_options.terms(words)
    assert hint_options.terms(hint_options.for_master(words)) == hint_options.terms(words)


# Round trips

OPTIONS = {
    "tmpfs": ["ro", "rw", "noexec", "rnosuid", "rslave", "size=1m", "size=10%", "mode=1777", "uid=5", "x-y=z"],
    "bind": ["ro", "noexec", "rbind", "rprivate", "cache=none"],
}
HINTS = st.sampled_from(["tmpfs", "bind"]).flatmap(
    lambda kind: st.builds(
        Hint,
        name=st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="-_"), min_size=1),
        source=st.lists(st.text("abc .=,", min_size=1), min_size=1).map(lambda p: "/" + "/".join(p).strip("./ ") + "x"),
        kind=st.just(kind),
        share=st.sampled_from(["container", "pod", "shared"]),
        options=st.lists(st.sampled_from(OPTIONS[kind]), unique=True).map(tuple),
    )
)


@given(HINTS, st.sampled_from(PREFIXES))
def test_parse_reads_what_render_writes(hint: Hint, prefix: str) -> None:
    hint = msgspec.structs.replace(hint, source=parse_hints(render(hint)).hints[0].source)
    assert parse_hints(render(hint, prefix)).hints == (hint,)
    assert msgspec.json.decode(msgspec.json.encode(hint), type=Hint) == hint


# Containers that come later


def test_hints_are_those_of_the_first_container() -> None:
    """Defect of the reference: hints of later containers were silently ignored."""
    late = Hint("late", "/late", "tmpfs", "pod")
    assert check_restated([DATA], [DATA]) == ()
    assert check_restated([DATA], []) == ()
    with pytest.raises(InvalidInput, match="hint late: source /late") as caught:
        check_restated([DATA], [DATA, late])
    assert caught.value.code == "hint-late"
    (warning,) = check_restated([DATA], [DATA, late], strict=False)
    assert "/late" in warning


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        msgspec.structs.replace(DATA, options=("ro",)),
        msgspec.structs.replace(DATA, share="container"),
        msgspec.structs.replace(DATA, source="/elsewhere"),
        msgspec.structs.replace(DATA, name="renamed"),
    ],
)
def test_contradicting_hint_of_a_later_container(other: Hint, strict: bool) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_restated([DATA], [other], strict=strict)
    assert caught.value.code == "hint-conflict"
    assert "the pod has dev.holdfast.mount.data.source=/vol/data" in str(caught.value)
