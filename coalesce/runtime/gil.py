"""How soon threads that serve get the interpreter's lock, and keep it, while another one traces.

Tracing, the passes and lowering keep the lock busy for tens of milliseconds a program, and who serves would wait for
it at every step of a request: Python hands it on after 5 ms at the earliest. While a tenant is taken in and while
programs are made, also on a user's thread, it does so after EAGER_S. That is a setting of the whole process, so what it
was before is remembered here for all runtimes, and comes back with the last of them that makes something, unless
somebody else has changed it meanwhile.

Who traces would have the lock back as soon, over and over, while a driver decides: so it gives way. It looks at every
call of a Python function (`sys.setprofile`, which is a thread's own) whether somebody serves right now, and sleeps
until that is done: up to GIVEN_S, and then it works for as long before it does so again. After every STRETCH_S of work
it sleeps for a moment whoever serves: Linux puts who wakes up on a processor that is taken, though it has a free one,
and there he would wait for the next tick. Where nobody was served lately, and on a thread that has a profiler already,
it does neither.

An interrupt (Ctrl-C) that finds it asleep is raised there, as it may be at the beginning of any function. So it sleeps
at no call of a function in C, which would not be called then, such as a lock's that lets go of it, and in none that
leaves a context.

Whoever waits for the lock asks for it after EAGER_S, by a timer. Linux lets timers come up to 50 us later, so that it
wakes up for several at once: beside a thread that computes a nap and the lock took 172 us in the median, and 17 where
the timers of who wanted it were exact. Those of the runtime's threads are meanwhile.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

EAGER_S = 2e-5
GIVEN_S = 2e-3
NAP_S = 2e-4  # who wakes up takes the lock for a moment
STRETCH_S = 3e-4  # with a BREATH_S after it
BREATH_S = 5e-5
LATELY_S = 10.0
LEAVING = frozenset({"__exit__", "__aexit__", "__del__"})
TIMER_SLACK = 29  # what Linux calls it


class Eagerness:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._usual_s = self._eager_s = 0.0
        self._at_work: set[object] = set()  # who serves right now
        self._served_s = -LATELY_S
        self._thread = threading.local()

    def begin(self, who: object) -> None:
        """This one has something to do for requests, or for the policy."""
        self._at_work.add(who)
        self.keep_time()

    def end(self, who: object) -> None:
        self._at_work.discard(who)

    def keep_time(self) -> None:
        """Timers of the calling thread are exact while somebody makes something."""
        is_exact = self._holders > 0
        if is_exact is not getattr(self._thread, "is_exact", False):
            self._thread.is_exact = is_exact
            set_timer_slack(int(is_exact))

    def note_served(self) -> None:
        """Requests are."""
        self._served_s = time.monotonic()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        gives_way = time.monotonic() - self._served_s < LATELY_S and sys.getprofile() is None
        # Held here: an interrupt in it takes it away, maybe from Python itself, which is about to call it.
        profile = giving_way(self._at_work)
        with self._lock:
            if not self._holders:
                self._usual_s = sys.getswitchinterval()
                sys.setswitchinterval(min(self._usual_s, EAGER_S))
                self._eager_s = sys.getswitchinterval()  # rounded to what Python counts in
            self._holders += 1
        if gives_way:
            sys.setprofile(profile)
        try:
            yield
        finally:
            if gives_way and sys.getprofile() is profile:
                sys.setprofile(None)
            with self._lock:
                self._holders -= 1
                if not self._holders and sys.getswitchinterval() == self._eager_s:
                    sys.setswitchinterval(self._usual_s)


def giving_way(at_work: Collection[object]) -> Callable[..., Any]:
    """What a thread does at every event of a profiler."""
    not_before_s, due_s = 0.0, time.perf_counter() + STRETCH_S

    def give_way(frame: Any, event: str, _: Any) -> None:
        nonlocal not_before_s, due_s
        if event != "call" or frame.f_code.co_name in LEAVING:
            return
        now_s = time.perf_counter()
        if at_work and now_s >= not_before_s:
            while at_work and time.perf_counter() < now_s + GIVEN_S:
                time.sleep(NAP_S)
            not_before_s = time.perf_counter() + GIVEN_S if at_work else 0.0
        elif now_s < due_s:
            return
        else:
            time.sleep(BREATH_S)
        due_s = time.perf_counter() + STRETCH_S

    return give_way


def set_timer_slack(ns: int) -> None:
    """By how much timers of the calling thread may come later, on Linux; 0: as usual."""
    if sys.platform.startswith("linux"):
        with suppress(AttributeError, OSError):  # a system that has no C library to ask
            ctypes.CDLL(None).prctl(TIMER_SLACK, *map(ctypes.c_ulong, (ns, 0, 0, 0)))


handing_on = Eagerness()  # one for the process, as the setting is
