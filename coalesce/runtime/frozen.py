"""What Python's collector of garbage looks through while somebody serves, and how often: not all that was there before,
and not whenever a few bundles of requests are under way.

A full collection holds the interpreter's lock for 100 ms and more where JAX and its programs are loaded, and programs
that are traced bring one about. What is there when the first runtime starts is set aside (`gc.freeze`) until the last
one is closed; if the process has set something aside by itself, nothing is changed. Garbage among it, a model that was
deleted just now, say, would stay as long, whatever the process did to collect it. So it is collected before, while
nobody is served yet: 20 to 60 ms where JAX is loaded, and 0.1 s for each million objects.

A request is some twenty objects until it ends, so that the usual threshold of 700 has the young ones looked through for
every few bundles. Until the last runtime is closed it is RARELY, as it is anyway in Python 3.13: what a runtime makes
is freed when nobody has it any more, without the collector. What has been added since is looked through by a full
collection, 73 ms after the programs of twenty families: once every fifteen of them it kept everybody waiting who was
served. Until then that comes after SELDOM collections of what is younger, instead of ten; where a device says that it
has no room for a tenant, one is made before it is refused. What the process has made rarer by itself stays, and so does
a collector that looks through nothing.

What is there when an executable has been made is set aside too: most of it stays as long as its tenant, and the next
collection of all that the last ten have left took 20 ms. What nobody has any more goes at once, as ever; cycles of
references among what was set aside wait for one in OFTEN of these times, when everything is looked through, or for the
last runtime to be closed. To collect them before each time would hold up who is served; a process that cannot wait for
its own takes back what was set aside (`gc.unfreeze`), and what is left is set aside again the next time.
"""

from __future__ import annotations

import gc
import threading

RARELY = 2000  # new objects: while programs are traced, to look through 5,000 takes 4 ms
SELDOM = 100  # after some two hundred families
FEW = 1000  # Python 3.12 begins with some hundred objects set aside
OFTEN = 400  # executables, of some hundred families


class SetAside:
    def __init__(self) -> None:
        self._lock = threading.RLock()  # what is collected may close a runtime
        self._holders = 0
        self._ours = False
        self._made = 0  # executables, since everything was looked through
        self._usual: tuple[int, int, int] | None = None  # thresholds, if we have changed them
        self._rare = (0, 0, 0)  # to these

    def begin(self) -> None:
        with self._lock:
            if not self._holders and gc.get_freeze_count() < FEW:
                gc.collect()  # first: an interrupt that comes meanwhile leaves nothing half done
            self._holders += 1
            if self._holders > 1:
                return
            thresholds = gc.get_threshold()
            rare = max(RARELY, thresholds[0]), thresholds[1], max(SELDOM, thresholds[2])
            if thresholds[0] and rare != thresholds:
                gc.set_threshold(*rare)
                self._usual, self._rare = thresholds, gc.get_threshold()  # a Python may have no use for the last one
            if gc.get_freeze_count() < FEW:
                self._ours, self._made = True, 0
                gc.freeze()

    def again(self) -> None:
        """An executable has been made."""
        with self._lock:
            if not self._ours or not gc.isenabled():
                return
            self._made += 1
            if self._made >= OFTEN:
                self._look_through()
            gc.freeze()

    def collect(self) -> None:
        """All garbage that there is, also of what was set aside by us."""
        with self._lock:
            self._look_through()
            if self._ours:
                gc.freeze()

    def _look_through(self) -> None:
        if self._ours:
            gc.unfreeze()
        self._made = 0
        gc.collect()

    def end(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders:
                return
            if self._usual is not None and gc.get_threshold() == self._rare:
                gc.set_threshold(*self._usual)
            self._usual = None
            if self._ours:
                self._ours = False
                gc.unfreeze()


set_aside = SetAside()  # one for the process, as the collector is
