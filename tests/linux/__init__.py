"""Tests of the modules of `linux`."""
