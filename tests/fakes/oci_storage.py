"""As much of OCI Object Storage, over WSGI, as the `oci` SDK's clients and CLI use for whole objects."""

import json
import re
from urllib.parse import unquote

from werkzeug.wrappers import Request, Response

NAMESPACE = "testing"
BUCKET = re.compile(rf"/n/{NAMESPACE}/b(?:/([^/]+))?/?")
OBJECT = re.compile(rf"/n/{NAMESPACE}/b/([^/]+)/o(?:/(.+))?")


def error(status, code):
    return Response(json.dumps({"code": code, "message": code}), status, content_type="application/json")


def answer(value):
    return Response(json.dumps(value), content_type="application/json")


class OCIStorage:
    """A WSGI application; `buckets` maps names to {object name: bytes}."""

    def __init__(self):
        self.buckets = {}

    def __call__(self, environ, start_response):
        return self.dispatch(Request(environ))(environ, start_response)

    def dispatch(self, request):
        if request.path.rstrip("/") == "/n":
            return answer(NAMESPACE)
        if match := OBJECT.fullmatch(request.path):
            if match[1] not in self.buckets:
                return error(404, "BucketNotFound")
            objects = self.buckets[match[1]]
            return (
                self.object(request, objects, unquote(match[2])) if match[2] else self.list(request, objects)
            )
        if match := BUCKET.fullmatch(request.path):
            name = match[1]
            if request.method == "POST":
                name = request.get_json()["name"]
                self.buckets.setdefault(name, {})
            return answer({"name": name}) if name in self.buckets else error(404, "BucketNotFound")
        return error(404, "NotFound")

    def list(self, request, objects):
        prefix, start = request.args.get("prefix", ""), request.args.get("start", "")
        names = sorted(n for n in objects if n.startswith(prefix) and n >= start)
        limit = int(request.args.get("limit", 1000))
        found = [{"name": n, "size": len(objects[n])} for n in names[:limit]]
        return answer({"objects": found, "prefixes": [], "nextStartWith": next(iter(names[limit:]), None)})

    def object(self, request, objects, name):
        if request.method == "PUT":
            objects[name] = request.get_data()
            return Response(headers={"etag": "1"})
        if name not in objects:
            return error(404, "ObjectNotFound")
        if request.method == "DELETE":
            del objects[name]
            return Response(status=204)
        content, status = objects[name], 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", "")):
            content, status = content[int(match[1]) : int(match[2]) + 1], 206
        return Response(content, status, headers={"etag": "1"}, content_type="application/octet-stream")
