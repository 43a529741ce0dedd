"""The cases of the vectors, family by family."""
