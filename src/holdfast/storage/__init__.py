"""The heart: what a pod holds, planned before it is touched, journalled before it is done, let go exactly once."""
