"""Programs as CUDA graphs of our own, which are launched without JAX and XLA.

    ended = ends(function)                        its program ends with a custom call, in which a capture ends too
    loaded = aside.load(compiled)                 on a second client of the device
    captured = aside.capture(loaded, reads, into) what it launches, with the addresses of what it reads and writes
    graph = Graph(line, [captured], loaded)
    graph.launch(); line.wait()                   some 10 us beside its kernels, where a call of JAX takes 60 to 100

To call an executable costs JAX and XLA more than most small programs take: each finds out anew what there is to do and
where memory is free. A CUDA graph of the kernels, with all addresses in it, does not. JAX makes graphs of its own, of
parts of a program, but launches them by the same way.
"""
