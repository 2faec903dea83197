"""LLaVA-style training and evaluation of a multimodal model on an encoder."""
