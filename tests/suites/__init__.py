"""Suites that drive several modules, or the whole."""
