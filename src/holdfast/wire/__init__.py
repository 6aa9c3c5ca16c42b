"""Frames and messages: host <-> guest and client <-> monitor.  The guest imports this: standard library only."""
