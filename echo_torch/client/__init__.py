"""One connection to one learner.

* `tcp_client`: `TcpClient`, the public face: checks samples, packs them, and passes rows on.
* `sender`: the callers' side: packs, waits for room and for acks, raises. Holds no socket.
* `connection`: what callers and the I/O thread share: the current pump, the I/O lock, and why the connection failed.
* `io_thread`: the thread: writes what callers leave, reads acks, reconnects, ends the connection.
* `pump`, `tls_pump`: one socket: move bytes and the counters ``written`` and ``acked``. No lock, no waiting.
* `reconnect`: when to try again, and when to give up. `resend`: rows that are sent once more.
* `flow`: how far callers run ahead, and how long acks may lie unread. `wakeup`: who sleeps in ``poll``, and how to
  wake them.

Rules:

* Locks, outermost first: packing (``Ring.packing_lock``), I/O (``Connection.io_lock``), then those of the wake-ups. Never block while
  holding one.
* The I/O thread never holds the client, so a client that is dropped is collected; the thread then delivers what is
  packed and ends.
* Ctrl-C may strike the main thread after any call. What a system call did is recorded by the C code that made it, and
  the I/O thread completes what an interrupt left undone, within a second.
* A forked child closes its copies of the descriptors and touches no lock.
"""
