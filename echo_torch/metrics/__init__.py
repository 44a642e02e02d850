"""Counters and timings: what happened to the samples, and where the time went.

* `stats`: `Counts` of one connection, and `SinkStats` and `PeerStats`, which `EchoSink.stats` returns.
* `timing`: seconds per cause of waiting, and a histogram of ack latencies.

Rules:

* Always on, so each update must cost well under a microsecond.
* Counts of samples have one writer at a time: the holder of the packing lock or of the I/O lock. Seconds are added up
  without a lock, so several threads that send at once may lose a little of them. Readers take no lock and may see a
  value that is a moment old.
"""
