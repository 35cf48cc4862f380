"""Pairs into an erased text encoder: loss terms, methods, and the one training loop."""
