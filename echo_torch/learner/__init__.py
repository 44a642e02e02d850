"""The other end: what an ``echo.Server`` received, as batches of tensors.

* `dataset`: `EchoDataset`, an iterable dataset over a server in the same process.
* `prefetch`: the thread that asks the server, so that Ctrl-C reaches whoever waits for a batch.
* `unpack`: the server's numpy views into tensors of the example's structure, shapes and dtypes.

Rules:

* One thread per dataset calls ``server.sample()``; each call returns the previous batch's slot to the server. So a
  batch is copied, or its user is done with it, before the next call.
* One lock guards the prefetcher's state. Nobody holds it while waiting, and finalizers do not need it.
* Nothing here imports the sending side.
"""
