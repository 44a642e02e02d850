"""One or several learners: which of them gets a batch, and what happens when one is lost.

* `route`: how a sink uses one client: our own takes blocks of rows, others take sample after sample.
* `connector`: opens the connections from the sink's arguments, in the training process and in DataLoader workers.
* `partition`: checks the user's routing function and what it returns.
* `balancer`: sends to several learners, in turns, by load, or as the function says.
* `failover`: hands the undelivered rows of a lost learner to the others.
* `prefix`: how many of the first samples are acked, when several learners ack independently.

Rules:

* Each learner has a client of its own, with that client's promises.
* Locks, outermost first: prefix, failover, then those of `client`. Both are held for moments, never while waiting.
* With failover, rows of a lost learner go out before anything new does.
"""
