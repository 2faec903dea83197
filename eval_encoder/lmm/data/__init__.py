"""From a list of conversations to batches of a multimodal model."""
