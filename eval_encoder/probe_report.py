"""The earlier name of `python -m eval_encoder.probe.report`."""

import sys

from eval_encoder.probe.report import main

if __name__ == "__main__":
    sys.exit(main())
