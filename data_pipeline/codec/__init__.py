"""Offline only: what a video codec knows about a clip (frames, motion vectors, residuals)
and which patches are selected by it.
"""
