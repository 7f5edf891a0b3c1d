"""Programs as CUDA graphs of our own, which are launched without JAX and XLA.

    ended = ends(function)                      whose program ends with a custom call, in which a capture ends too
    graph = Aside.capture(compiled, arguments)  what it launches, recorded once on a second client of the device
    graph.launch(); graph.wait()                some 20 us beside its kernels, where a call of JAX takes 90

To call an executable costs JAX and XLA more than most small programs take: each finds out anew what there is to do and
where memory is free. A CUDA graph of the kernels, with all addresses in it, does not. JAX makes graphs of its own, of
parts of a program, but launches them by the same way.
"""
