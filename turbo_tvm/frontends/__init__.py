"""Frontends: a trained model to one Relax module with symbolic batch and length, weights as parameters."""
