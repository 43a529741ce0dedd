"""The suites. Nothing is imported from here but by tests."""
