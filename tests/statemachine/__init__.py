"""Tests of the modules of `statemachine`."""
