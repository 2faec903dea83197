"""The multimodal model: tower, projector, language model."""
