"""Images: OCI layouts and archives in, content-addressed layer disks out.

``store`` is what others use.  Under it: ``sources`` opens what was given, ``layout`` reads its documents, ``tarstream``
reads the headers of a layer, ``extract`` writes its files, ``erofs`` makes the disk, ``layers`` keeps the disks.
"""
