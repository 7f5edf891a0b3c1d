"""The runtime: requests of many tenants in, results out, by deadlines, while tenants come and go.

    Runtime      what users hold: tenants, requests, and what is known of both
    Driver       one thread that asks a policy of coalesce.scheduler what to do, and does it
    Launcher     puts bundles on the device, on the driver's thread or one of its own
    Finisher     one thread that waits for bundles and hands out their results
    Callbacks    one thread that calls users back
    Foundry      one thread that makes executables before they are needed
    Machine      the device: banks of weights, executables, and bundles on their way

A request is a `Ticket` from submit to its end. Everything that happens goes through the driver's inbox, in the order in
which it happened. Only the driver's thread touches the machine.
"""
