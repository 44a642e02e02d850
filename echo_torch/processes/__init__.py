"""One ``wait()`` over several processes: what DataLoader workers and other children sent for the same sink.

* `ledger`: one small memory-mapped file per child: what it sent, what was acked, and how it ended.
* `child`: the child's half: a thread that writes the file, and delivers when the child ends.
* `parent`: the parent's half: adds the files up, and waits until everything in them is acked.
* `file_locks`: whether a process is alive: by a lock that the kernel drops when it dies, and by its process id.

Rules:

* Each file has one writer, the child, and one reader, its parent. Only ``finish`` and ``counted`` go the other way.
* The parent makes and marks the folder before a child can start. So a folder that is missing was removed by others.
* Empty flag files tell children that start later that the sink was closed, or that its learner was not found.
* The files survive fork, spawn and forkserver. They need no multiprocessing primitive, which would not pickle.
* A forked child compares process ids before it touches a lock.
* The parent changes its state by one assignment, after the file is gone. So an interrupt counts no child twice.
* The next sink that makes a folder removes the files of dead parents.
"""
