"""What all tests share: output without colours, whatever the environment asks for."""

import os

# As many workers as cores run the tests: more threads of numpy would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

for variable in ("FORCE_COLOR", "CLICOLOR_FORCE"):  # of a CI service, for logs that people read
    os.environ.pop(variable, None)
