"""From a checked image to a name in a registry: statements, gate, registry, verification."""
