"""Mixture-of-experts and dual models."""
