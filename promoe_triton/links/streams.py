"""What copies need of a device: a stream for every lane, events, and host memory that the device can read by itself.

Only `links/` makes streams. The computing thread's stream is whatever is current there.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any, Protocol

import torch
from torch import Tensor

from promoe_triton.stores.registration import Release

PORTABLE = 1
"""cudaHostRegisterPortable: registered for every GPU of the process, not only for the thread's current one."""


class Lane(Protocol):
    """A stream of copies, used by one thread at a time, which owns it when it copies or pauses."""

    def here(self) -> Any:
        """Return where the calling thread's work for this lane's device goes now, for `back`."""
        ...

    def own(self) -> None:
        """The calling thread gives the device nothing to do but this lane's copies, from now on, or until `back`."""
        ...

    def back(self, here: Any) -> None:
        """Let the calling thread's work go where it went before."""
        ...

    def after(self, event: Any) -> None:
        """Begin no further copy before the event has come."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy bytes from the host, after all that this lane was told before. Returns before that is done."""
        ...

    def pause(self, seconds: float) -> None:
        """Do nothing for so long, after all that this lane was told before."""
        ...

    def mark(self) -> Any:
        """Return an event that comes when all is done that this lane was told before; its time is known then."""
        ...

    def finish(self) -> None:
        """Return when every copy of this lane is done."""
        ...


class Streams(Protocol):
    """The streams of one device."""

    def mark(self, timed: bool = False) -> Any:
        """Return an event that comes when all work is done that the calling thread has issued so far.

        timed: its time is known then.
        """
        ...

    def wait(self, event: Any) -> None:
        """Let what the calling thread issues from now on begin after an event."""
        ...

    def has_come(self, event: Any) -> bool: ...

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the time between two events that have come, whose times are known."""
        ...

    def settle(self, event: Any) -> None:
        """Return when an event of `mark` has come."""
        ...

    def follow(self, last: Any) -> Any:
        """Let what the calling thread issues from now on begin after all that was issued to the stream `last`.

        Returns the calling thread's stream, and `last` again where nothing was issued to wait: while a graph is
        captured, whose replays run where their caller says. None: wait for nothing.
        """
        ...

    def lane(self) -> Lane:
        """Return a new lane."""
        ...

    def pin(self, address: int, nbytes: int) -> Release | None:
        """Let the device read whole pages of the host's memory by itself, until the returned call.

        None where that cannot be. No page may be pinned twice.
        """
        ...


CALIBRATION = 1 << 24
"""Cycles for which a device does nothing, to see how long they take."""


class CudaLane:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._cycles = 0.0  # in a second

    def here(self) -> Any:
        return torch.cuda.current_device(), torch.cuda.current_stream(self._device)

    def own(self) -> None:
        # For many copies at once: it takes as long as to issue one.
        torch.cuda.set_stream(self._stream)  # which makes its device the current one

    def back(self, here: Any) -> None:
        device, stream = here
        torch.cuda.set_stream(stream)
        torch.cuda.set_device(device)

    def after(self, event: Any) -> None:
        self._stream.wait_event(event)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def pause(self, seconds: float) -> None:
        sleep: Any = torch.cuda._sleep  # a kernel that only counts cycles
        if not self._cycles:
            begin = self.mark()
            sleep(CALIBRATION)
            end = self.mark()
            self.finish()
            self._cycles = CALIBRATION / (begin.elapsed_time(end) / 1e3)
        sleep(int(seconds * self._cycles))

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def finish(self) -> None:
        self._stream.synchronize()


class CudaStreams:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self, timed: bool = False) -> Any:
        event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def has_come(self, event: Any) -> bool:
        return bool(event.query())

    def seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3

    def settle(self, event: Any) -> None:
        event.synchronize()

    def follow(self, last: Any) -> Any:
        stream = torch.cuda.current_stream(self._device)
        if last is None or stream == last:
            return stream
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                return last
        stream.wait_stream(last)
        return stream

    def lane(self) -> Lane:
        return CudaLane(self._device)

    def pin(self, address: int, nbytes: int) -> Release | None:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        # Of this device: else the call would open a context, half a gigabyte, on the first GPU.
        with torch.cuda.device(self._device):
            if int(runtime.cudaHostRegister(address, nbytes, PORTABLE)):
                # The runtime keeps the error for this thread's next kernel, an innocent one: this one. (Zeros may be
                # written without a kernel.)
                with contextlib.suppress(RuntimeError):
                    torch.ones(1, device=self._device)
                return None
        return lambda: runtime.cudaHostUnregister(address)


class HostLane:
    def here(self) -> Any:
        return None

    def own(self) -> None:
        pass

    def back(self, here: Any) -> None:
        pass

    def after(self, event: Any) -> None:
        pass

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def mark(self) -> Any:
        return time.perf_counter()

    def finish(self) -> None:
        pass


class HostStreams:
    """RAM as if it were a device's memory, for tests: everything is done when its call returns. An event is a time."""

    def mark(self, timed: bool = False) -> Any:
        return time.perf_counter()

    def wait(self, event: Any) -> None:
        pass

    def has_come(self, event: Any) -> bool:
        return True

    def seconds(self, begin: Any, end: Any) -> float:
        return float(end - begin)

    def settle(self, event: Any) -> None:
        pass

    def follow(self, last: Any) -> Any:
        return last

    def lane(self) -> Lane:
        return HostLane()

    def pin(self, address: int, nbytes: int) -> Release | None:
        return lambda: None


def streams_of(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else HostStreams()


class Order:
    """The order of work that shares memory and comes on one stream after the other, as its callers choose.

    Whoever is the only one to issue work calls `follow` first. Work on another stream than the last waits for that one.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        # Memory that is taken now may be memory that work on this stream still reads.
        self._last = streams.follow(None)

    def follow(self) -> None:
        self._last = self._streams.follow(self._last)
