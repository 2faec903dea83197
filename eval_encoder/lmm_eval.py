"""A trained model answers a question file: `python eval_encoder/lmm_eval.py --model OUT ...`."""

import sys

from eval_encoder.lmm.questions import main

if __name__ == "__main__":
    sys.exit(main())
