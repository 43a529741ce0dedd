"""Every system call refused, every moment a crash."""
