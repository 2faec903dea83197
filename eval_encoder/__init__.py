"""Judging an encoder: attentive probe on labelled videos (helpers start with `probe_`, see
docs/evaluation.md), and as the eye of a language model (`lmm_`, see docs/llava.md).
"""
