"""The ring of rows: one block of host memory that stages samples, bounds memory, and keeps samples for resending.

* `ring`: the rows, the counters that say how far each stage is, and the callers that wait for acks.
* `pack`: packs a batch's leaves into rows on the CPU.
* `staging`: packs a batch on an accelerator into rows. One kernel packs, a side stream copies, and an event shows when
  the copy is done.

Rules:

* A sample is one row, and its bytes exist once on the host. The counters only grow, except that a
  reconnect moves ``written`` back to ``released``. On one connection::

      released <= acked <= written <= ready <= packed <= reserved <= released + capacity
      released = max(0, acked - keep_acked)

* The packing lock (``Ring.packing_lock``) orders callers. Its holder moves ``reserved`` and ``packed``, and never
  waits.
* The holder of the connection's I/O lock moves ``written`` and ``acked``. Readers need no lock.
* Ctrl-C can strike after any call, so a run of assignments marked "nothing comes between" must stay in one piece.
* Query the device's events, and never wait for them. If rows cannot be staged, `staging` raises `StagingError`, and the
  batch goes through pageable host memory instead.
"""
