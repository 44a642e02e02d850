"""Counters and timings: what happened to the samples, and where the time went.

* `stats`: `Counts` of one connection, and `SinkStats` and `PeerStats`, which `EchoSink.stats` returns.
* `timing`: seconds per cause of waiting, and a histogram of ack latencies.

Rules:

* Always on, so each update must cost well under a microsecond.
* Each number has one writer at a time: the caller that is packing, or the holder of the I/O lock. Readers take no lock
  and may see a value that is a moment old.
"""
