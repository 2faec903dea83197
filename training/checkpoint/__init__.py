"""Checkpoints: what a folder holds, how it is written and read, from which one a run resumes."""
