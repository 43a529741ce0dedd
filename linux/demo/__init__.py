"""`nshandoff demo`: two allocations from request to release, checked; see `command`."""
