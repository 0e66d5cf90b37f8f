"""Hooks of a training: they save, average weights, evaluate, and stop it."""
