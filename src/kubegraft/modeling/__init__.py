"""Backbones, heads and classifiers: what is trained, where its weights come from, and what stays frozen."""
