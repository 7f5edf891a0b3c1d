"""Which work runs next, and when: requests and their deadlines, policies, and a simulator with a virtual clock.

Nothing here computes, waits or reads a clock, and nothing imports JAX or the compiler. A policy is told what happened
and when (`events`), and answers with what is to be done (`commands`); it knows what could run from a `catalog`. The
driver in `coalesce.runtime` carries its commands out on a device, the simulator on a heap of events.

Times are integers in nanoseconds of one monotonic clock.
"""
