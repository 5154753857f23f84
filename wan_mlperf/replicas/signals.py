"""The signals that stop a job, for a thread to read: the main one may be inside a collective that never returns."""

from __future__ import annotations

import select
import signal
import socket

from wan_mlperf import process


class Signals:
    """Takes over `process.STOPS` until `close`, except those that are ignored (nohup). Create it in the main thread."""

    def __init__(self) -> None:
        self._wake, self._wakened = socket.socketpair()
        for end in (self._wake, self._wakened):
            end.setblocking(False)
        # The C handler writes the signal's number at once, whatever the main thread is inside of.
        signal.set_wakeup_fd(self._wakened.fileno(), warn_on_full_buffer=False)
        stops = [number for number in process.STOPS if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in stops}

    def wait(self, timeout_s: float) -> list[int]:
        """Return the numbers of the signals that came, after `timeout_s` at the latest."""
        ready, _, _ = select.select([self._wake], [], [], timeout_s)
        return [number for number in self._wake.recv(64) if number in self._handlers] if ready else []

    def close(self) -> None:
        """Restore the handlers that were there before."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
