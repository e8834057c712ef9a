"""Synthetic tasks with exact rewards, a modality each."""
