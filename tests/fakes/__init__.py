"""Object storage on loopback: moto as S3, a fake of OCI's, and a layer in front that injects faults."""

import os
import random
import socket
import struct
import threading
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.fakes.oci_storage import OCIStorage

BUCKET = "tests"


class Quiet(WSGIRequestHandler):
    """HTTP/1.1 without a line for each request."""

    protocol_version = "HTTP/1.1"

    def log_request(self, *args):
        pass


class Faults:
    """WSGI middleware. rate: share of requests that fail, by turns with 503, a reset, or half of the body;
    denied: paths that contain this get 403; watch: called with (method, path) before each request.
    """

    def __init__(self, app):
        self.app, self.random = app, random.Random(0)
        self.heal()
        self.failed = 0

    def heal(self):
        self.rate, self.denied, self.watch = 0.0, None, lambda method, path: None

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        query = environ.get("QUERY_STRING", "").replace("%2F", "/")
        self.watch(method, path)
        if self.denied and self.denied in f"{path}?{query}":
            return self.refuse(environ, start_response, "403 Forbidden")
        if self.random.random() >= self.rate:
            return self.app(environ, start_response)
        self.failed += 1
        kind = self.random.choice(("status", "reset", "half"))
        if kind == "status":
            return self.refuse(environ, start_response, "503 Service Unavailable")
        if kind == "half":
            return half(self.app(environ, start_response), environ["werkzeug.socket"])
        reset(environ["werkzeug.socket"])
        raise ConnectionResetError

    @staticmethod
    def refuse(environ, start_response, status):
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(status, [("Content-Length", "0"), ("Connection", "close")])
        return [b""]


def half(body, connection):
    content = b"".join(body)
    yield content[: len(content) // 2]
    reset(connection)
    raise ConnectionResetError


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RDWR)


class Cloud:
    """A running service; `env` is what a process needs to use it, `uri` where to put things."""

    def __init__(self, scheme, home):
        self.scheme, self.home = scheme, Path(home)
        self.app = OCIStorage() if scheme == "oci" else DomainDispatcherApplication(create_backend_app)
        self.faults = Faults(self.app)
        self.server = make_server("127.0.0.1", 0, self.faults, threaded=True, request_handler=Quiet)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.env = self.oci_env() if scheme == "oci" else self.s3_env()

    def uri(self, path):
        return f"{self.scheme}://{BUCKET}/{path}"

    def s3_env(self):
        import boto3

        env = {
            "S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        os.environ.update(env)
        boto3.client("s3", endpoint_url=self.endpoint).create_bucket(Bucket=BUCKET)
        return env

    def oci_env(self):
        """The SDK looks for its configuration in HOME, or where OCI_CONFIG_FILE says."""
        self.app.buckets[BUCKET] = {}
        folder = self.home / ".oci"
        folder.mkdir(parents=True)
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        (folder / "key.pem").write_bytes(pem)
        (folder / "config").write_text(
            f"[DEFAULT]\nuser=ocid1.user.oc1..tester\ntenancy=ocid1.tenancy.oc1..testing\nregion=us-ashburn-1\n"
            f"fingerprint={':'.join(['00'] * 16)}\nkey_file={folder / 'key.pem'}\n"
        )
        for file in folder.iterdir():
            file.chmod(0o600)
        path = f"{Path(__file__).parent / 'site'}:{Path(__file__).parent.parent.parent}"
        return {"HOME": str(self.home), "FAKE_OCI_ENDPOINT": self.endpoint, "PYTHONPATH": path}

    def close(self):
        self.server.shutdown()
