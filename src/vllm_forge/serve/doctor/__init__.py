"""Can this host serve a deployment? Asked without changing anything."""
