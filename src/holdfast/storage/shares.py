"""Host directories and files shown in the guest.

The sandbox exports one folder, over 9p if it is a machine, and a share is a numbered entry in it.  What a container's
plan shares is shared at once: one commit of what is about to be done, the host's half of each, one request to the
guest for all, one commit of what was done; and so it is let go of.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING

import msgspec

from holdfast.errors import GuestFailed, HoldfastError, TimedOut, from_dict
from holdfast.spec import guest_requests as requests
from holdfast.storage.attachments import FLUSH_SECONDS, GUEST_SECONDS, add_causes, while_alive
from holdfast.storage.counted import HalfMade
from holdfast.storage.counted_many import CountedMany
from holdfast.storage.export import CACHE_MODES, DEFAULT_CACHE, Export, Identity, Place, ShareKey, identify
from holdfast.storage.undo import UNDO_SECONDS, not_released

if TYPE_CHECKING:
    from collections.abc import Sequence

    from holdfast.machine.sandbox import Sandbox
    from holdfast.storage.journal import Journal


class Share(msgspec.Struct, frozen=True):
    """A share: where in the export it is, and where the guest has it.

    Attributes:
        row: in the journal.
    """

    key: ShareKey
    identity: Identity
    place: Place
    row: int

    @property
    def number(self) -> int:
        return self.place.number

    @property
    def file(self) -> str:
        """The name of a file that is shared alone; empty for a directory."""
        return self.identity.shown

    @property
    def mount_path(self) -> str:
        """Where the guest has its directory, or the folder that its file is in."""
        return f"/run/mounts/shares/{'m' if self.place.group < 0 else ''}{self.place}"

    @property
    def guest_path(self) -> str:
        return f"{self.mount_path}/{self.file}" if self.file else self.mount_path


class Shares:
    """The shares of one pod."""

    def __init__(self, sandbox: Sandbox, journal: Journal, pod: str) -> None:
        self._sandbox = sandbox
        self._journal = journal
        self._pod = pod
        self._last = -1
        self._export = Export(sandbox)
        self._refreshing: set[asyncio.Task[None]] = set()
        self._refresh_one = asyncio.Lock()
        self._stale: set[int] = set()
        self._shared: CountedMany[Identity, Share] = CountedMany(self._remove_all)

    async def add(self, key: ShareKey, holder: str, *, file: bool) -> Share:
        """Shows a directory, or one file, in the guest, or counts one more holder.

        Raises:
            InvalidInput: another file is there than the one that was seen.
            HoldfastError: what went wrong; nothing of it is left.
        """
        return (await self.add_all([(key, file)], holder))[0]

    async def add_all(self, wanted: Sequence[tuple[ShareKey, bool]], holder: str) -> list[Share]:
        """The same for many, with one request to the guest; each is a key and whether it is a file.

        Raises:
            InvalidInput, HoldfastError: see :meth:`add`; ``holder`` has none of them then.
        """
        identities = [identify(key, file=file) for key, file in wanted]
        keys = {identity: key for identity, (key, _) in zip(identities, wanted, strict=True)}
        return await self._shared.acquire_all(
            identities, holder, lambda new: self._add_all([(identity, keys[identity]) for identity in new])
        )

    async def remove(self, share: Share, holder: str) -> None:
        """Lets go of a share; can be tried again when it fails.

        Raises:
            NotReleased: the guest keeps it busy.
        """
        await self.remove_all([share], holder)

    async def remove_all(self, shares: Sequence[Share], holder: str) -> None:
        """The same for many, with one request to the guest.

        Raises:
            NotReleased: the guest keeps some of them busy; the others are gone.
        """
        errors = await self._shared.release_all([share.identity for share in shares], holder)
        if len(errors) > 1:
            raise not_released("remove shares", holder, errors)
        if errors:
            raise errors[0]

    async def retry(self) -> list[Exception]:
        """See :meth:`Counted.retry`."""
        return await self._shared.retry()

    async def settle(self) -> None:
        """See :meth:`Counted.settle`."""
        await self._shared.settle()

    async def _add_all(self, new: list[tuple[Identity, ShareKey]]) -> list[Share | BaseException]:
        """Makes shares: the host's half of each, then the guest's of all; what fails is taken back."""
        shares = self._intended(new)
        failed: dict[int, BaseException] = self._published(shares)
        published = [share for share in shares if share.number not in failed]
        refused: dict[int, BaseException]
        try:
            answers = await self._ask_all("Add", [_settings(share) for share in published])
            refused = {share.number: why for share, why in zip(published, answers, strict=True) if why is not None}
            self._journal.hold_all(share.row for share in published if share.number not in refused)
        except BaseException as error:
            refused = {share.number: error for share in published}
        # The guest may have it mounted even when its answer does not come: undoing is removing.
        failed |= await self._removed([share for share in published if share.number in refused], refused)
        return [failed.get(share.number, share) for share in shares]

    def _intended(self, new: list[tuple[Identity, ShareKey]]) -> list[Share]:
        # Never numbers that were used before: a guest that caches ("loose") would show an earlier share's files.
        numbers = range(self._last + 1, self._last + 1 + len(new))
        self._last += len(new)
        places = [Place(number) for number in numbers]
        for cache in CACHE_MODES:  # the guest has a mount for each
            same = [i for i, (identity, _) in enumerate(new) if not identity.shown and identity.cache == cache]
            if len(same) > 1:
                for index in same:
                    places[index] = Place(numbers[index], numbers[same[0]])
        intents = [
            (key.path, {"number": number, "read_only": key.read_only})
            for number, (_, key) in zip(numbers, new, strict=True)
        ]
        rows = self._journal.intend_all(self._pod, "share", intents)
        return [Share(key, identity, place, row) for place, row, (identity, key) in zip(places, rows, new, strict=True)]

    def _published(self, shares: list[Share]) -> dict[int, BaseException]:
        """Does the host's half; returns the outcomes for those that it could not do, once they are taken back."""
        failed: dict[int, BaseException] = {}
        try:
            for group in {share.place.group for share in shares} - {-1}:
                self._export.make_group(group, [share.number for share in shares if share.place.group == group])
            for share in shares:
                try:
                    replaced = functools.partial(self._replaced, share)
                    self._export.publish(share.place, share.key, share.identity, replaced)
                except Exception as error:
                    failed[share.number] = error
        except Exception as error:
            failed = {share.number: error for share in shares}
        back = [share for share in shares if share.number in failed]
        left = self._export.withdraw([(share.place, share.file) for share in back])
        try:
            self._journal.release_all(share.row for share, cause in zip(back, left, strict=True) if cause is None)
        except Exception as error:
            left = [error] * len(back)
        for share, cause in zip(back, left, strict=True):
            if cause is not None:
                add_causes(failed[share.number], [cause])
                failed[share.number] = HalfMade(failed[share.number], share)
        return failed

    async def _removed(self, shares: list[Share], errors: dict[int, BaseException]) -> dict[int, BaseException]:
        """The outcomes for shares that the guest could not be given: ``errors``, once they are removed."""
        if not shares:
            return {}
        left: Sequence[Exception | None]
        try:
            async with asyncio.timeout(UNDO_SECONDS):
                left = await self._remove_all(shares)
        except TimeoutError:
            left = [TimedOut("remove share", why=f"not done within {UNDO_SECONDS:g} s")] * len(shares)
        except Exception as error:
            left = [error] * len(shares)
        outcomes: dict[int, BaseException] = {}
        for share, cause in zip(shares, left, strict=True):
            why = outcomes[share.number] = errors[share.number]
            if cause is not None:
                if not (isinstance(why, HoldfastError) and cause in why.causes):  # one error may be of many shares
                    add_causes(why, [cause])
                outcomes[share.number] = HalfMade(why, share)
        return outcomes

    def _replaced(self, share: Share) -> None:
        if share.number not in self._stale:
            self._stale.add(share.number)
            task = asyncio.ensure_future(self._refresh(share))
            self._refreshing.add(task)
            task.add_done_callback(self._refreshing.discard)

    async def _refresh(self, share: Share) -> None:
        """Lets the guest forget what it has in memory of the file that was there before."""
        settings = requests.LCOWMappedDirectory(mount_path=share.guest_path, share_name=str(share.place))
        async with self._refresh_one:  # a file that is replaced all the time does not fill the guest with requests
            self._stale.discard(share.number)
            request = requests.encode(requests.GuestRequest("Update", settings))
            with contextlib.suppress(HoldfastError):  # it has none if it does not have the share, or does not live
                await self._sandbox.request("modify", request, GUEST_SECONDS)

    async def _ask_all(
        self, action: requests.RequestType, many: list[requests.LCOWMappedDirectory], seconds: float = GUEST_SECONDS
    ) -> list[HoldfastError | None]:
        """Asks the guest for many things at once; returns for each why it was not done, or None."""
        if not many:
            return []
        answer = await self._sandbox.request("modify", requests.encode_all(action, many), seconds)
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list) or len(results) != len(many) or not all(isinstance(r, dict) for r in results):
            raise GuestFailed(f"{action} shares", why="the guest's answer is not one result for each", code="answer")
        errors = [result.get("error") for result in results]
        return [from_dict(error) if isinstance(error, dict) else None for error in errors]

    async def _remove_all(self, shares: list[Share]) -> list[Exception | None]:
        """Removes shares: the guest's half of all, then the host's of each that the guest has let go of."""
        self._journal.releasing_all(share.row for share in shares)
        errors: list[Exception | None] = [None] * len(shares)

        async def ask() -> None:
            names = [requests.LCOWMappedDirectory(s.mount_path, share_name=str(s.place)) for s in shares]
            errors[:] = await self._ask_all("Remove", names, FLUSH_SECONDS)

        await while_alive(self._sandbox, ask)
        if self._sandbox.died.done():
            errors = [None] * len(shares)
        # What stays published keeps its number and its line in the journal.
        free = [index for index, error in enumerate(errors) if error is None]
        left = self._export.withdraw([(shares[index].place, shares[index].file) for index in free])
        for index, error in zip(free, left, strict=True):
            errors[index] = error
        self._journal.release_all(share.row for share, error in zip(shares, errors, strict=True) if error is None)
        return errors

    def freeze(self) -> tuple[tuple[tuple[Share, dict[str, int]], ...], int]:
        """Every share with its holders, as data, and the highest number that one had."""
        return tuple((share, self._shared.counts(share.identity)) for share, _ in self.items()), self._last

    def adopt(self, frozen: Sequence[tuple[Share, dict[str, int]]], last: int) -> None:
        """Takes over what the guest has: does the host's half of each share; the guest makes its own anew.

        Raises:
            InvalidInput: something else is at its path now.
        """
        self._last = last
        intents = [(share.key.path, {"number": share.number, "read_only": share.key.read_only}) for share, _ in frozen]
        rows = self._journal.intend_all(self._pod, "share", intents)
        ours = [msgspec.structs.replace(share, row=row) for (share, _), row in zip(frozen, rows, strict=True)]
        for error in self._published_again(ours).values():
            raise error
        self._journal.hold_all(rows)
        for share, (_, holders) in zip(ours, frozen, strict=True):
            self._shared.adopt(share.identity, share, holders)

    def _published_again(self, shares: list[Share]) -> dict[int, BaseException]:
        """Groups as they were, whoever of them is left."""
        groups: dict[int, list[Share]] = {}
        for share in shares:
            groups.setdefault(share.place.group, []).append(share)
        failed: dict[int, BaseException] = {}
        for some in groups.values():
            failed |= self._published(some)
        return failed

    @property
    def unsettled(self) -> bool:
        """See :attr:`Counted.unsettled`."""
        return self._shared.unsettled

    def items(self) -> list[tuple[Share, list[str]]]:
        """Every share with its holders, by number."""
        return sorted(((s, holders) for _, s, holders in self._shared.items()), key=lambda item: item[0].number)


def _settings(share: Share) -> requests.LCOWMappedDirectory:
    cache = "" if share.key.cache == DEFAULT_CACHE else share.key.cache
    return requests.LCOWMappedDirectory(
        share.mount_path, share_name=str(share.place), read_only=share.key.read_only, cache=cache
    )
