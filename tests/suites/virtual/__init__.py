"""Lives of a provider and of consumers in a virtual world, and what runs them in every order."""
