"""Tests of the modules of `transport`."""
