"""What a sample is: a pytree of leaves with fixed shapes and dtypes, and whether a batch is made of such samples.

* `pytree`: containers into leaves, and the key path of each leaf.
* `leaf`: which values can be sent, the dtype in which they travel, and how they become numpy arrays.
* `spec`: compares every batch with the example, and puts its leaves in wire order.
* `mismatch`: the error messages: path, got, expected, remedy.

Rules:

* The wire knows only item sizes, so every leaf of every batch is checked for path, shape and dtype.
* Values are never cast. dtypes that numpy lacks (bfloat16, float8) travel as unsigned integers of the same size.
* `spec` and `leaf` run on every send and must be fast. `mismatch` runs only for a batch that is wrong.
* There are no locks, threads or file descriptors here.
"""
