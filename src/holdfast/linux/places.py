"""Where Holdfast keeps its things if nobody says where: root's on the host, others' where the XDG base directory
specification puts them."""

from __future__ import annotations

import os

ROOT_STATE = "/run/holdfast"
ROOT_DATA = "/var/lib/holdfast"


def default_state() -> str:
    """The state root: gone with the host's next start."""
    if not os.geteuid():
        return ROOT_STATE
    return f"{os.environ.get('XDG_RUNTIME_DIR') or f'/run/user/{os.geteuid()}'}/holdfast"


def default_data() -> str:
    """The data folder."""
    if not os.geteuid():
        return ROOT_DATA
    return f"{os.environ.get('XDG_DATA_HOME') or os.path.expanduser('~/.local/share')}/holdfast"
