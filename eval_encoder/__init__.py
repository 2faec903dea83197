"""Evaluation of an encoder: by an attentive probe on labelled videos (helpers start with `probe_`,
see docs/evaluation.md), and as the vision tower of a language model (`lmm_`, see docs/llava.md).
"""
