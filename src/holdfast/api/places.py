"""Where the state and the data of pods are, if whoever asks does not say."""

from __future__ import annotations

import os
from pathlib import Path

from holdfast.linux.places import default_data, default_state


def state_root(root: str | Path | None = None) -> Path:
    """``root``, else ``$HOLDFAST_ROOT``, else ``/run/holdfast``, or ``$XDG_RUNTIME_DIR/holdfast`` as a user."""
    return Path(root or os.environ.get("HOLDFAST_ROOT") or default_state()).absolute()


def data_folder(data: str | Path | None = None) -> Path:
    """``data``, else ``$HOLDFAST_DATA``, else ``/var/lib/holdfast``, or ``$XDG_DATA_HOME/holdfast`` as a user."""
    return Path(data or os.environ.get("HOLDFAST_DATA") or default_data()).absolute()
