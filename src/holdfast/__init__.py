"""Holdfast: OCI containers inside small virtual machines, their storage held and let go exactly once.

``holdfast.run``, ``holdfast.restore``, ``holdfast.Pod``, ``holdfast.Result`` and ``holdfast.volumes`` are imported when
they are first used: the agent in a guest imports this package too, and has no use for them.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from holdfast.api import Pod as Pod
    from holdfast.api import Result as Result
    from holdfast.api import restore as restore
    from holdfast.api import run as run
    from holdfast.api import volumes as volumes
    from holdfast.errors import HoldfastError as HoldfastError

__version__ = "0.1.0"
__all__ = ["HoldfastError", "Pod", "Result", "restore", "run", "volumes"]


def __getattr__(name: str) -> object:
    if name == "HoldfastError":
        from holdfast.errors import HoldfastError

        return HoldfastError
    if name in __all__:
        from holdfast import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
