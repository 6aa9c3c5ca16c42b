"""Holdfast: OCI containers inside small virtual machines, their storage held and let go exactly once."""

__version__ = "0.1.0"
