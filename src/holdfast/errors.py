"""The one tree of errors.

Every error says *what* failed, on which *subject*, *why* (the kernel's or QEMU's own words
where there are any) and what to do next (*hint*), and carries a stable ``code`` that programs
may match on.  Classes are by meaning, not by module: a caller catches :class:`InUse` whether a
disk, a volume or a template is in use.

Imported by the guest agent too, so it imports nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class HoldfastError(Exception):
    """Root of the tree.

    Args:
        what: the action that failed, in the imperative past ("attach disk").
        subject: the object it failed on (a path, an id, a digest).
        why: the cause, with the kernel's or tool's own text.
        hint: the next thing to do; may be a command.
        code: a narrower stable code than the class's own.
        causes: further errors that happened while undoing or releasing.
    """

    code = "failed"
    #: Exit status of a command that ends with this error (podman's convention).
    exit_status = 125
    #: Whether the same call may succeed when tried again unchanged.
    retryable = False

    def __init__(
        self,
        what: str,
        *,
        subject: object = "",
        why: object = "",
        hint: str = "",
        code: str = "",
        causes: Sequence[BaseException] = (),
    ) -> None:
        self.what = what
        self.subject = _text(subject)
        self.why = _text(why)
        self.hint = hint
        if code:
            self.code = code
        self.causes = tuple(causes)
        super().__init__(what)

    def also(self, *errors: BaseException) -> None:
        """Adds further errors; never this one itself, of which a machine that is gone has only one for everybody."""
        self.causes += tuple(error for error in errors if not _is_within(self, error))

    def __str__(self) -> str:
        text = self.what
        if self.subject:
            text += f" {self.subject}"
        if self.why:
            text += f": {self.why}"
        if self.hint:
            text += f" ({self.hint})"
        for cause in self.causes:
            text += f"; also: {cause}"
        return text

    def as_dict(self) -> dict[str, object]:
        """The error as a JSON object: what ``--json`` prints and what crosses a wire."""
        record: dict[str, object] = {
            "code": self.code,
            "kind": type(self).__name__,
            "what": self.what,
            "subject": self.subject,
            "why": self.why,
            "hint": self.hint,
        }
        if self.causes:
            record["causes"] = [from_exception(cause).as_dict() for cause in self.causes]
        return record


def _is_within(error: BaseException, other: BaseException) -> bool:
    return other is error or any(_is_within(error, cause) for cause in getattr(other, "causes", ()))


class InvalidInput(HoldfastError):
    """What the caller gave cannot be right: an option, a specification, a file's contents."""

    code = "invalid-input"


class NotFound(HoldfastError):
    """The named image, pod, bundle, file or device does not exist."""

    code = "not-found"


class InUse(HoldfastError):
    """Somebody else holds it; the error names the holder."""

    code = "in-use"


class Exhausted(HoldfastError):
    """No room is left: SCSI slots, disk space, memory."""

    code = "exhausted"


class Unsupported(HoldfastError):
    """This host, kernel, QEMU or guest cannot do it."""

    code = "unsupported"


class Corrupt(HoldfastError):
    """Contents do not match what they are declared to be: a digest, a size, a format."""

    code = "corrupt"


class TimedOut(HoldfastError):
    """A deadline passed."""

    code = "timed-out"
    retryable = True


class MachineFailed(HoldfastError):
    """QEMU or the guest kernel failed: did not start, did not boot, died."""

    code = "machine-failed"


class GuestFailed(HoldfastError):
    """The agent answered a request with an error."""

    code = "guest-failed"


class ProtocolError(HoldfastError):
    """The peer sent something that is not the protocol."""

    code = "protocol"


class CommandNotExecutable(HoldfastError):
    """The container's command exists and cannot be executed."""

    code = "command-not-executable"
    exit_status = 126


class CommandNotFound(HoldfastError):
    """The container's command does not exist in its root filesystem."""

    code = "command-not-found"
    exit_status = 127


class NotReleased(HoldfastError):
    """Something could not be let go of; it stays recorded, and the next try goes on from there."""

    code = "not-released"
    retryable = True


_KINDS = {
    kind.__name__: kind
    for kind in (
        HoldfastError, InvalidInput, NotFound, InUse, Exhausted, Unsupported, Corrupt, TimedOut,
        MachineFailed, GuestFailed, ProtocolError, CommandNotExecutable, CommandNotFound, NotReleased,
    )
}  # fmt: skip


def _text(value: object) -> str:
    if isinstance(value, OSError) and value.strerror:
        return value.strerror + (f" (errno {value.errno})" if value.errno else "")
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value)


def from_dict(record: Mapping[str, object]) -> HoldfastError:
    """The error that :meth:`HoldfastError.as_dict` described; unknown kinds become the root's."""
    kind = _KINDS.get(str(record.get("kind", "")), HoldfastError)
    causes = record.get("causes", ())
    return kind(
        str(record.get("what", "unknown failure")),
        subject=record.get("subject", ""),
        why=record.get("why", ""),
        hint=str(record.get("hint", "")),
        code=str(record.get("code", "")),
        causes=[from_dict(cause) for cause in causes if isinstance(cause, dict)] if isinstance(causes, list) else (),
    )


def from_exception(error: BaseException) -> HoldfastError:
    """``error`` itself if it is ours, else an error of ours that carries its text."""
    if isinstance(error, HoldfastError):
        return error
    if isinstance(error, OSError):
        return HoldfastError("system call failed", subject=error.filename or "", why=error)
    why = f"{type(error).__name__}: {error}{_place(error)}"
    return HoldfastError("unexpected failure", why=why, code="internal")


def _place(error: BaseException) -> str:
    """Where a fault of ours was raised: the one thing that a report of it must say."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    return f" at {trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
