"""The demonstration: small questions and a small language model."""
