"""Tools that hold a backend or a provider on a node to the protocol."""
