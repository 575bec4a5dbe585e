"""Golden files: what every cell, preset, host and checkpoint gives, so that a change is seen."""
