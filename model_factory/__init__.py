"""The encoder: layers, packing, models and their conversions.
Flat, relative imports, no other package of ours.
"""

from .registry import create_model, list_models, packing_config, packing_name

__all__ = ["create_model", "list_models", "packing_config", "packing_name"]
