"""Towers for multimodal models: projectors, ViT-Split, CrossGET, ConvNeXt, exported folders."""
