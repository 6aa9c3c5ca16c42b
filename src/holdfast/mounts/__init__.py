"""Mounts as a library: safe paths, options, probing filesystems, unmounting.  Also runs in the guest."""
