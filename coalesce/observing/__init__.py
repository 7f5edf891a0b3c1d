"""What can watch a runtime, each an `Observer` of coalesce.runtime to give to `Runtime(observers=[...])`.

    Metrics       Prometheus: counts, latencies, device time, queues            needs coalesce-jax[metrics]
    Spans         OpenTelemetry: a span a request, its bundles below it         needs coalesce-jax[spans]
    Trace         Chrome's trace format: decisions, bundles, lanes, deadlines   loads in Perfetto
    Recording     every event and what was decided, to replay                   JSON lines
    Predictions   how long each bundle was expected to take, and took           JSON lines or CSV

All that they know belongs to the object; nothing is registered in the process. What takes longer than a count is done
on a thread of their own (`Aside`), so that the runtime's never wait for it.
"""
