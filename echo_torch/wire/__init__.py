"""echo's wire protocol, version 1, and how we open a connection.

* `protocol`: handshake and acks as bytes and values; no sockets, no threads.
* `connect`: from a host name to a socket that has completed the handshake, under one deadline.
* `tls`, `tls_socket`: TLS for a proxy in front of the learner, over OpenSSL's memory buffers.
* `keepalive`: detects a host that vanished without closing its connections.
* `tcp_info`: what the kernel tells about a connection.
* `poll`: waits for a socket in short pieces.

Rules:

* Sockets are non-blocking. One deadline covers resolving, connecting and all handshakes.
* The peer is not trusted: no count that it sends makes us read or allocate more than a fixed limit.
* A paused learner is not a fault, so nothing here times out because acks are missing.
* Name lookups run on a daemon thread, because ``getaddrinfo`` cannot be interrupted.
* A forked child closes its copies of the sockets, and never shuts the parent's connection down.
"""
