"""What an `EchoSink` has in one process: its connection, its children, its watermark and its totals.

* `session`: opens the connection once, delivers batches, waits, closes, and decides between raising and warning.
* `watermark`: the highest step up to which everything is acked.
* `totals`: the counters of this process, its children and earlier runs, as `EchoSink.stats` returns them.

Rules:

* A sink is configuration, so you can pickle it. A session belongs to one process and never leaves it. The sink looks
  its session up by process id before it takes any lock.
* Locks, outermost first: session, report, then those of `routing`. Nobody takes another lock while holding the
  watermark's.
"""
