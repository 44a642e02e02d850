"""One or several learners: which of them gets a batch, and what happens when one is lost.

* `route`: what a sink needs of a client. `TcpClient` has it; other clients get a wrapper, sample by sample.
* `connector`: opens the connections from the sink's arguments, in the training process and in DataLoader workers.
* `partition`: checks the user's routing function and what it returns.
* `balancer`: sends to several learners, in turns, by load, or as the user's function says.
* `failover`: hands the undelivered rows of a lost learner to the others.
* `prefix`: how many samples, counted from the first, are acked when several learners ack independently.

Rules:

* Each learner has its own client, with that client's guarantees.
* Locks, outermost first: prefix, failover, then those of `client`. Hold the first two for moments only.
* With failover, the rows of a lost learner go out before any new rows.
"""
