"""Ctrl-C and SIGTERM: stop after this step, so that the run can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While it is entered, the first SIGINT or SIGTERM only sets `requested`.

    The second raises KeyboardInterrupt where the program is. Leaving gives back the handlers that
    were there before. A signal that the process was told to ignore stays ignored; outside of the
    main thread, where Python sets no handlers, nothing is changed.

    Attributes:
        requested: whether to stop once this step is done.
    """

    def __init__(self, notify: Callable[[str], Any] = lambda message: None) -> None:
        """
        Args:
            notify: told, at the first signal, what is going to happen.
        """
        self.requested = False
        self._notify = notify
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for one in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(one) != signal.SIG_IGN:
                    self._former[one] = signal.signal(one, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._former:
            signal.signal(*self._former.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            raise KeyboardInterrupt(name)
        self.requested = True
        self._notify(f"{name}: stopping after this step; once more to stop at once")
