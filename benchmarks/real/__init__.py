"""Measurements on real models and real languages."""
