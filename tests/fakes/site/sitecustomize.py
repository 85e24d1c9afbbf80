"""On PYTHONPATH of a test's processes: sends every client of the `oci` SDK to the fake service."""

import os

if "FAKE_OCI_ENDPOINT" in os.environ:
    from oci.object_storage import ObjectStorageClient

    original = ObjectStorageClient.__init__

    def patched(self, config, **kwargs):
        original(self, config, **{**kwargs, "service_endpoint": os.environ["FAKE_OCI_ENDPOINT"]})

    ObjectStorageClient.__init__ = patched
