"""Pods: the monitor that owns one, its containers, and the client that talks to it."""
