"""The other end: what an ``echo.Server`` received, as batches of tensors.

* `dataset`: `EchoDataset`, an iterable dataset over a server in the same process.
* `prefetch`: the thread that asks the server, so that Ctrl-C can interrupt the threads that wait for a batch.
* `unpack`: converts the server's numpy views into tensors of the example's structure, shapes and dtypes.

Rules:

* One thread per dataset calls ``server.sample()``. Each call returns the previous batch's slot to the server. So the
  batch must be copied, or you must be done with it, before the next call.
* One lock guards the prefetcher's state. No thread holds it while waiting, and finalizers do not need it. Another one,
  for each server, is held around ``server.sample()``.
* Nothing here imports the sending side.
"""
