"""System calls by ctypes, owned file descriptors, kernel features.  Imports nothing of Holdfast but ``errors``."""
