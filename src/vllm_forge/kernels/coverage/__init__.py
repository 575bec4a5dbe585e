"""Which device code an image holds, and whether it covers the needs of a cell."""
