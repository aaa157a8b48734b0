"""Triton versions of the ops that have one; imported by :mod:`vtc.kernels.dispatch` when a call needs them.

Every function has the signature of its torch twin and raises :class:`vtc.kernels.dispatch.Unsupported` for what it does not
serve. Arithmetic is float32, no kernel uses atomics, and block sizes do not depend on the batch: equal inputs give equal bits, in
any batch.
"""
