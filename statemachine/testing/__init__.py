"""Tools that hold an implementation of the kernels to the protocol."""
