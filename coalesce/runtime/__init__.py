"""The runtime: requests of many tenants in, results out, by deadlines, while tenants come and go.

    Runtime      what users hold: tenants, requests, and what is known of both
    Driver       one thread that asks a policy of coalesce.scheduler what to do, and does it
    Launcher     puts bundles on the device, on a thread of its own where that takes long
    Finisher     one thread that waits for bundles and hands out their results
    Foundry      one thread that makes executables before they are needed
    Machine      the device: banks of weights, executables, and bundles on their way

A request is a `Ticket` from submit to its end. Everything that happens goes through the driver's inbox, in the order in
which it happened. Only the driver touches the machine, but for launches, and while the launcher has none to do.
"""
