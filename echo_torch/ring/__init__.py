"""The ring of rows: host memory that is staging area, backpressure, memory bound and retransmission buffer at once.

* `ring`: the rows, the counters that say how far each stage is, and the callers that wait for them.
* `pack`: leaves of a batch on the CPU into rows.
* `staging`: batches on an accelerator into rows: one kernel packs, a side stream copies, an event tells when the copy
  is done.

Rules:

* A sample is one row, and its bytes exist once on the host. The counters only grow::

      released <= acked <= written <= ready <= packed <= reserved <= released + capacity

* The packing lock (``Ring.packing_lock``) orders callers. Its holder moves ``reserved`` and ``packed``, and never waits.
* The holder of the connection's I/O lock moves ``written`` and ``acked``. Readers need no lock.
* Ctrl-C may strike after any call, so a run of assignments marked "nothing comes between" must stay in one piece.
* Events of the device are queried, never waited for. Where rows cannot be staged, `staging` raises `StagingError`,
  and the batch goes through pageable host memory instead.
"""
