"""One connection to one learner.

* `tcp_client`: `TcpClient`, the public class: a `Sender` of samples. Checks them, and says how to pack them.
* `sender`: the callers' side, in rows. Packs, waits for room and for acks, raises. Holds no socket.
* `connection`: what callers and the I/O thread share: the current pump, the I/O lock, and why the connection failed.
* `io_thread`: the thread. Writes what callers leave, reads acks, reconnects, and ends the connection.
* `pump`, `tls_pump`: one socket each. Move bytes and the counters ``written`` and ``acked``. No lock, no waiting.
* `reconnect`: when to try again, and for how long. `resend`: the rows that are sent once more.
* `flow`: how far callers run ahead of the acks, and how long acks may stay unread.
* `wakeup`: the threads that sleep in ``poll``, and how other threads wake them.

Rules:

* Locks, outermost first: packing (``Ring.packing_lock``), I/O (``Connection.io_lock``), then the wake-ups' locks. Never
  block while you hold one.
* The I/O thread never holds the client, so Python can collect a client that you drop. The thread then delivers what is
  packed and ends.
* Ctrl-C can interrupt the main thread after any call. The C code that makes a system call also records its result, and
  the I/O thread completes, within a second, what an interrupt left undone.
* A forked child closes its copies of the descriptors and touches no lock.
"""
