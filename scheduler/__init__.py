"""Which work runs next, and when.

The serving runtime lives in this package: requests and their deadlines, the policy that picks the lanes of the next
fused run, admission, the latency model, a simulator with a virtual clock, and the driver that carries decisions out
on a device. Deciding is kept apart from waiting and from computing: a policy is a pure function of its arguments and
imports neither JAX nor the compiler. This release holds the compiler alone, and the package is empty.
"""
