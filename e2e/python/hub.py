"""Serves one model directory as a Hugging Face hub does, to who has the token: hub.py FOLDER REPOSITORY TOKEN ADDRESS PORT.

Once it listens it prints a line; it prints another for each file that is fetched, and ends with its standard input.
"""

import hashlib
import http.server
import json
import pathlib
import sys
import threading

folder, repository, token, address, port = pathlib.Path(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5])
COMMIT = "0123456789abcdef0123456789abcdef01234567"
files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def hash_of(name):
    if name.endswith(".safetensors"):
        return hashlib.sha256(files[name]).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(files[name]) + files[name]).hexdigest()


def listed(name):
    entry = {"rfilename": name, "size": len(files[name]), "blobId": hash_of(name)}
    if name.endswith(".safetensors"):
        entry["lfs"] = {"sha256": hash_of(name), "size": len(files[name])}
    return entry


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, code, body, headers=()):
        self.send_response(code)
        self.send_header("content-length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if self.headers.get("authorization") != f"Bearer {token}":
            return self.answer(401, b"{}")
        if path == f"/api/models/{repository}/revision/main":
            listing = {"sha": COMMIT, "siblings": [listed(name) for name in files]}
            return self.answer(200, json.dumps(listing).encode())
        name = path.removeprefix(f"/{repository}/resolve/{COMMIT}/")
        if name not in files:
            return self.answer(404, b"", [("x-error-code", "RepoNotFound")])
        body, total = files[name], len(files[name])
        etag = ("etag", f'"{hash_of(name)}"')
        if self.headers.get("range") is None:
            print(f"whole {name}", flush=True)
            return self.answer(200, body, [etag])
        start, _, end = self.headers["range"].removeprefix("bytes=").partition("-")
        start, end = int(start), min(int(end or total - 1), total - 1)
        where = ("content-range", f"bytes {start}-{end}/{total}")
        self.answer(206, body[start : end + 1], [etag, where])

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer((address, port), Hub)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
print("listening", flush=True)
sys.stdin.read()
