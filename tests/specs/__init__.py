"""Tests of the book: it runs, it is fresh, its scenarios play."""
