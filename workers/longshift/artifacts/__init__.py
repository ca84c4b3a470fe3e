"""The cold tier: immutable bytes in S3 or in a local folder.

    store = open_store("s3://bucket/prefix?region=eu-central-1")        # or file:///var/lib/longshift
    with await spool(request.stream(), limit=256 * 1024 * 1024) as upload:
        key = object_key(tenant, upload.sha256, generation)
        await store.put(key, upload, size=upload.size, content_type="application/pdf")
    data = await read_verified(store, key, sha256=upload.sha256)

The object is uploaded before the event or row that points to it, so whoever follows a pointer finds the bytes. One
store per process, opened after any fork. boto3 is imported when the first ``s3://`` store is opened, not before.
"""

from longshift.artifacts.location import open_store
from longshift.artifacts.serving import ANY_TYPE, disposition
from longshift.artifacts.spool import CHUNK, Digest, Spooled, in_memory, read_file, spool
from longshift.artifacts.store import ArtifactStore, check_range, object_key, read_verified

__all__ = [
    "ANY_TYPE",
    "CHUNK",
    "ArtifactStore",
    "Digest",
    "Spooled",
    "check_range",
    "disposition",
    "in_memory",
    "object_key",
    "open_store",
    "read_file",
    "read_verified",
    "spool",
]
