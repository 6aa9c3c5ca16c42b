"""The OCI runtime specification: reading bundles, checking them, writing specs for images, parsing mounts."""
