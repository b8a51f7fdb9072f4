"""Environments in the box, each small and documented."""
