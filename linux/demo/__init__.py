"""`nshandoff demo`: two allocations from request to release, checked; `command` lists the parts."""
