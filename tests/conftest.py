"""What all tests share: output without colours, whatever the environment asks for."""

import os

for variable in ("FORCE_COLOR", "CLICOLOR_FORCE"):  # of a CI service, for logs that people read
    os.environ.pop(variable, None)
