"""Serving: presets to one command line, their lint, a cell's plan, and checks of the host."""
