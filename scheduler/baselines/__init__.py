"""Policies to compare with: other ideas of what runs next, on the same interface, each as good as we can make it.

    Fifo        one request at a time, in the order of arrival: time multiplexing
    Edf         one request at a time, by deadline
    Clockwork   batches, by latest start; how long runs take from the last ten
    Symphony    batches as late as they can be, and nobody who would make them small
    Packing     batches by deadline, as wide as the first of them can wait for; at once, or at the latest moment

They decide with what is true of every policy done for them (`Desk`): who is refused at submit, what waits where, what
is hopeless, what is on the device, who fails. None of them has admission by demand, shares, quarantine or executables
of several families: those are the ideas of `Coalescing`.
"""
