"""A thread that works beside its caller: files are written while the next ones are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Beside:
    """One thread for calls, which it does in order; a context, at whose end they are done.

    An error of a call is raised by the caller's next one, or at the end; none comes after it. Where the caller fails or
    is interrupted, the call that is being done is finished, and no other one begins.

    Args:
        most: calls that wait at a time, and with them what they hold; then the caller waits.
    """

    def __init__(self, most: int = 4) -> None:
        self._most, self._failed = most, False
        self._pool = ThreadPoolExecutor(1, "pose2id-beside")
        self._calls: deque[Future[None]] = deque()

    def __enter__(self) -> Beside:
        return self

    def do(self, function: Callable[..., Any], *given: Any) -> None:
        """Call a function soon."""
        while self._calls and (len(self._calls) >= self._most or self._calls[0].done()):
            self._calls.popleft().result()
        self._calls.append(self._pool.submit(self._call, function, given))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._calls and kind is None:
                self._calls.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _call(self, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
        if self._failed:
            return
        try:
            function(*given)
        except BaseException:
            self._failed = True
            raise
