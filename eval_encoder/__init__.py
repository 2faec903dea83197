"""Judging an encoder: attentive probe on labelled videos. Helpers start with `probe_`:
see docs/evaluation.md.
"""
