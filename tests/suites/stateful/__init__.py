"""Stateful suites: the provider and the consumer, driven by Hypothesis."""
