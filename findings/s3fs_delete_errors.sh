#!/usr/bin/env bash
# s3fs: deleting several objects at once reports success although the service refused some of them.
#
# DeleteObjects answers with status 200 and lists, key by key, what was deleted and what was refused (<Error>). s3fs
# 2026.9.0 looks at the status only: `rm` of a list returns as if every object were gone. `rm_file` of the same object,
# which sends DeleteObject and gets 403, raises PermissionError.
#
# Seen: "list: no error", "one: PermissionError".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 's3fs==2026.9.0' 'fsspec==2026.9.0'
cat >"$folder/check.py" <<'PY'
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

os.environ.update(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret", AWS_DEFAULT_REGION="us-east-1")
import s3fs

NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


class Storage(BaseHTTPRequestHandler):
    """Lists two objects, and refuses to delete either."""

    protocol_version = "HTTP/1.1"

    def answer(self, status, text):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        objects = "".join(
            f"<Contents><Key>{name}</Key><Size>1</Size><ETag>&quot;e&quot;</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name in ("a", "b")
        )
        self.answer(200, f"<ListBucketResult {NAMESPACE}><IsTruncated>false</IsTruncated>{objects}</ListBucketResult>")

    def do_HEAD(self):
        self.answer(200, "x")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        errors = "".join(
            f"<Error><Key>{key}</Key><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            for key in re.findall("<Key>(.*?)</Key>", body)
        )
        self.answer(200, f"<DeleteResult {NAMESPACE}>{errors}</DeleteResult>")

    def do_DELETE(self):
        self.answer(403, "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Storage)
threading.Thread(target=server.serve_forever, daemon=True).start()
storage = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{server.server_port}", skip_instance_cache=True)


def outcome(action):
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return "no error"


several, one = outcome(lambda: storage.rm(["bucket/a", "bucket/b"])), outcome(lambda: storage.rm_file("bucket/a"))
print(f"s3fs {s3fs.__version__}; list: {several}; one: {one}")
assert (several, one) == ("no error", "PermissionError"), "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/check.py"
