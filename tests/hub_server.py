"""A Hub on the loopback interface for huggingface_hub's own client: repositories of files, in memory."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

OWNER = "user"
MODEL = r"(?P<model>[^/]+(?:/[^/]+)?)"
ROUTES = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "validate": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", rf"/api/models/{MODEL}/preupload/(?P<revision>.+)"),
    "batch": ("POST", rf"/{MODEL}\.git/info/lfs/objects/batch"),
    "upload": ("PUT", r"/lfs/(?P<oid>\w+)"),
    "commit": ("POST", rf"/api/models/{MODEL}/commit/(?P<revision>.+)"),
    "branch": ("POST", rf"/api/models/{MODEL}/branch/(?P<revision>.+)"),
    "tree": ("GET", rf"/api/models/{MODEL}/tree/(?P<revision>[^/]+)"),
    "file": ("GET|HEAD", rf"/{MODEL}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    "info": ("GET", rf"/api/models/{MODEL}(?:/revision/(?P<revision>.+))?"),
}
WRITES = {"whoami", "create", "preupload", "batch", "commit", "branch"}


class Hub(ThreadingHTTPServer):
    """Serves while the context lasts.

    Attributes:
        models: name -> revision -> path -> content.
        private: names of private models.
        requests: the route of each, in order.
        breaks: routes whose next connection ends without an answer.
    """

    daemon_threads = True

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.breaks: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self):
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = {
            route: match.groupdict()
            for route, (methods, pattern) in ROUTES.items()
            if self.command in methods.split("|") and (match := re.fullmatch(pattern, path))
        }
        if not found:
            return self.answer({"error": f"no route for {self.command} {path}"}, 501)
        route, names = next(iter(found.items()))
        self.server.requests.append(route)
        if route in self.server.breaks:
            self.server.breaks.remove(route)
            self.close_connection = True
            return None
        names = {name: unquote(value) for name, value in names.items() if value is not None}
        try:
            self.check_access(route, names.get("model"))
            getattr(self, route)(body, **names)
        except Refused as refused:
            self.answer({"error": refused.message}, refused.status, {"X-Error-Code": refused.code})

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *arguments):
        pass

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def check_access(self, route: str, model: str | None) -> None:
        authorization = self.headers.get("Authorization")
        known = authorization == f"Bearer {self.server.token}"
        if route in WRITES and not known:
            raise Refused(401, f"Invalid credentials {authorization}")
        if route not in WRITES and model in self.server.private and not known:
            raise Refused(401, "Private", "RepoNotFound")
        proposes = "create_pr=1" in self.path or "/refs%2Fpr%2F" in self.path or route == "batch"
        if route in WRITES and model and not model.startswith(f"{OWNER}/") and not proposes:
            raise Refused(403, f"{authorization} may not write")

    def files(self, model: str, revision: str = "main") -> dict[str, bytes]:
        if model not in self.server.models:
            raise Refused(404, "Repository not found", "RepoNotFound")
        revisions = self.server.models[model]
        # a commit's name, by which clients ask for the files once they know it, stands for its revision
        revision = next((name for name in revisions if revision in (name, sha(revisions[name]))), None)
        if revision is None:
            raise Refused(404, "Revision not found", "RevisionNotFound")
        return revisions[revision]

    def whoami(self, body):
        self.answer({"type": "user", "name": OWNER, "orgs": []})

    def create(self, body):
        wanted = json.loads(body)
        model = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != OWNER:
            raise Refused(403, f"{self.headers.get('Authorization')} may not write")
        status = 409 if model in self.server.models else 200
        if status == 200:
            self.server.models[model] = {"main": {".gitattributes": b""}}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.server.private.add(model)
        self.answer({"url": f"{self.server.url}/{model}"}, status)

    def validate(self, body):
        valid = re.match(r"---\n.+?\n---\n", json.loads(body)["content"], re.DOTALL)
        self.answer({"errors": [] if valid else [{"message": "no metadata"}]}, 200 if valid else 400)

    def preupload(self, body, model, revision):
        files = self.files(model, revision)

        def described(path):
            large = path.endswith((".safetensors", "tokenizer.json"))
            oid_of = sha256 if large else git_oid
            oid = oid_of(files[path]) if path in files else None
            return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

        self.answer({"files": [described(file["path"]) for file in json.loads(body)["files"]]})

    def batch(self, body, model):
        objects = json.loads(body)["objects"]
        for stored in objects:
            if stored["oid"] not in self.server.stored:
                stored["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{stored['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        assert sha256(body) == oid
        self.server.stored[oid] = body
        self.answer({})

    def commit(self, body, model, revision):
        files, pull_request = dict(self.files(model, revision)), "create_pr=1" in self.path
        for line in body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        if pull_request:
            number = 1 + sum(name.startswith("refs/pr/") for name in self.server.models[model])
            revision = f"refs/pr/{number}"
        self.server.models[model][revision] = files
        pull_request_url = f"{self.server.url}/{model}/discussions/{number}" if pull_request else None
        url = f"{self.server.url}/{model}/commit/{sha(files)}"
        self.answer({"commitUrl": url, "commitOid": sha(files), "pullRequestUrl": pull_request_url})

    def branch(self, body, model, revision):
        self.server.models[model][revision] = dict(self.files(model))
        self.answer({})

    def info(self, body, model, revision="main"):
        files = self.files(model, revision)
        siblings = [{"rfilename": path} for path in files]
        private = model in self.server.private
        self.answer({"id": model, "sha": sha(files), "private": private, "siblings": siblings, "tags": []})

    def tree(self, body, model, revision):
        files = self.files(model, revision).items()
        self.answer([{"type": "file", "path": path, "size": len(c), "oid": git_oid(c)} for path, c in files])

    def file(self, body, model, revision, path):
        files = self.files(model, revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{sha256(files[path])}"', "X-Repo-Commit": sha(files)}
        self.answer(files[path], headers=headers)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha(files: dict[str, bytes]) -> str:
    return hashlib.sha1("".join(f"{path} {git_oid(files[path])}" for path in sorted(files)).encode()).hexdigest()
