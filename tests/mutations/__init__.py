"""Mutations as data, one list per package or area; tests/mutants.py applies them."""

from .codec import CODEC
from .embedded import EMBEDDED
from .eval_encoder import EVAL_ENCODER
from .loading import LOADING
from .model_factory import MODEL_FACTORY
from .mutant import Mutant
from .training import TRAINING

MUTANTS: tuple[Mutant, ...] = (
    *MODEL_FACTORY,
    *CODEC,
    *EMBEDDED,
    *LOADING,
    *TRAINING,
    *EVAL_ENCODER,
)
