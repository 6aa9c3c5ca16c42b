"""What every test gets: a place of its own, and a check that nothing of it remains.

Fixtures:
    state_root    an empty state root, its path short enough for sockets; ``HOLDFAST_ROOT`` names it meanwhile
    data_root     images, guests and templates, shared by all tests and kept for the next run (``HOLDFAST_DATA``)
    run_folder    this run's own folder, for fixtures that live longer than a test
    nothing_remains   (automatic) fails a test that leaves something behind; see ``leaks.py``
"""

from __future__ import annotations

import itertools
import os
import secrets
import tempfile
from pathlib import Path

import hypothesis
import pytest

from holdfast.linux import syscalls
from tests import leaks

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache"
FOLDERS = ("unit", "kernel", "vm", "clients")  # in the order in which they run: what is quick first
DATA_ROOT = Path(os.environ.get("HOLDFAST_TEST_DATA") or CACHE / "data")
DEFAULT_STATE_ROOT = "/run/holdfast"

_run = pytest.StashKey[tuple[str, leaks.Watch, list[str]]]()
_numbers = itertools.count(1)
#: Of the test that runs.
_state_roots: list[str] = []

hypothesis.configuration.set_hypothesis_home_dir(CACHE / "hypothesis")
hypothesis.settings.register_profile("holdfast", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("holdfast")


def pytest_configure(config: pytest.Config) -> None:
    """Gives the run a folder, an environment, and (as root) a mount namespace of its own."""
    folder = tempfile.mkdtemp(prefix="hf", dir="/tmp")
    watched = [folder]
    if os.geteuid() == 0 and _private_mounts():
        watched.append(DEFAULT_STATE_ROOT)
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # tmp_path stays where it always is
    os.makedirs(f"{folder}/tmp")
    tempfile.tempdir = os.environ["TMPDIR"] = f"{folder}/tmp"
    os.environ["HOLDFAST_ROOT"] = f"{folder}/default"
    os.environ["HOLDFAST_DATA"] = str(DATA_ROOT)
    os.environ[leaks.TOKEN_NAME] = secrets.token_hex(8)
    config.stash[_run] = (folder, leaks.Watch(*watched), watched)


def _private_mounts() -> bool:
    """Nothing that tests mount reaches the host, nothing that others mount looks like ours."""
    try:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    except OSError:  # root without the right to (a container), or in a chroot, where "/" is not a mount
        return False
    os.makedirs(DEFAULT_STATE_ROOT, mode=0o711, exist_ok=True)
    syscalls.mount("holdfast-tests", DEFAULT_STATE_ROOT, "tmpfs")  # hides pods that are in use
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test with its folder's name, and puts them in order."""

    def folder_of(item: pytest.Item) -> str:
        return item.path.relative_to(HERE).parts[0]

    for item in items:
        item.add_marker(folder_of(item))
        if folder_of(item) != "unit" and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))
    items.sort(key=lambda item: FOLDERS.index(folder_of(item)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Looks once more when the longest-lived fixtures are gone too."""
    watch = session.config.stash[_run][1]
    leaks.expect_nothing()
    found = [leak for leak in watch.settled_leaks() if leak.kind != "fd"]  # pytest's own come and go
    if found:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter:
            reporter.write_line("")
            reporter.write_line(leaks.report("the run", found), red=True)
        watch.clean_up(found)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the run's folder, whether or not there was a run."""
    if _run in config.stash:
        leaks.remove_folder(config.stash[_run][0])


@pytest.fixture(autouse=True)
def nothing_remains(request: pytest.FixtureRequest):
    """Fails a test that leaves a process, mount, loop device, file or descriptor behind."""
    with leaks.Watch(*request.config.stash[_run][2]) as watch:
        yield watch
        try:
            if found := watch.settled_leaks():
                watch.clean_up(found)
                pytest.fail(leaks.report("the test", found), pytrace=False)
        finally:
            while _state_roots:  # empty folders, which every later look would go through
                leaks.remove_folder(_state_roots.pop())


@pytest.fixture(scope="session")
def run_folder(request: pytest.FixtureRequest) -> Path:
    """This run's own folder under /tmp; removed at the end of the run."""
    return Path(request.config.stash[_run][0])


@pytest.fixture
def state_root(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state root, and the default one of commands that the test runs."""
    path = run_folder / f"r{next(_numbers)}"
    path.mkdir(mode=0o711)
    _state_roots.append(str(path))
    monkeypatch.setenv("HOLDFAST_ROOT", str(path))
    return path


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The data folder that all tests share; what is in it makes the next run quick."""
    DATA_ROOT.mkdir(mode=0o700, parents=True, exist_ok=True)
    return DATA_ROOT
