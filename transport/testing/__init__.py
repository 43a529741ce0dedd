"""Tools that hold a provider or a consumer on a socket to the protocol."""
