"""The exhaustive search of our kernels."""
