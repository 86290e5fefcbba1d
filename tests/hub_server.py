"""A small Hub for tests: repositories in memory behind the part of the Hub's HTTP protocol that our code uses.

python tests/hub_server.py TOKEN  # prints its address, then serves until it is killed

Writing, and reading private repositories, needs TOKEN. Safetensors go through Git LFS, as on the real Hub. `GET /_log`
tells the requests answered so far.
"""

import base64
import hashlib
import json
import re
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

Files = dict[str, bytes]
DATE = "2025-01-01T00:00:00.000Z"


class HubError(Exception):
    """A refusal: HTTP status, the Hub's code for it, and a message."""

    def __init__(self, status: int, code: str, message: str = ""):
        super().__init__(message or code)
        self.status, self.code = status, code


class Repo:
    """Commits (id -> files) and branches (name -> id) of one repository."""

    def __init__(self, private: bool):
        self.private, self.commits, self.branches = private, {}, {}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(self, branch: str, files: Files) -> str:
        """Add a commit to a branch; returns its id."""
        sha = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit id of a branch or commit id."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound")
        return sha


class Hub(ThreadingHTTPServer):
    """The server with its repositories and LFS objects."""

    daemon_threads = True

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.repos, self.lfs, self.log = token, {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def object_id(path: str, content: bytes) -> str:
    """What identifies a version of a file: SHA-256 for LFS, else git's blob id."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def metadata_errors(content: str) -> list[str]:
    """What the Hub would object to in a card: the fields that it checks, in short."""
    block = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
    if block is None:
        return ["no metadata block"]
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    types = {"license": str, "pipeline_tag": str, "tags": list, "datasets": list}
    wrong = [name for name, kind in types.items() if not isinstance(data.get(name, kind()), kind)]
    errors = [f"{name} is no {types[name].__name__}" for name in wrong]
    for model in data.get("model-index", []):
        for result in model["results"]:
            known = (result.get("task", {}).get("type"), *(result.get("dataset", {}).get(n) for n in ("type", "name")))
            errors += ["model-index: task or dataset incomplete"] if None in known else []
            errors += [
                f"model-index: {metric.get('name')} needs type and value"
                for metric in result["metrics"]
                if metric.get("type") is None or not isinstance(metric.get("value"), (int, float))
            ]
    return errors


class Handler(BaseHTTPRequestHandler):
    """One request: `ROUTES` says which method answers it."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        path, method = unquote(urlsplit(self.path).path), "GET" if self.command == "HEAD" else self.command
        self.body = self.read_body()
        try:
            for allowed, pattern, route in ROUTES:
                if allowed == method and (match := re.fullmatch(pattern, path)):
                    route(self, *match.groups())
                    return
            raise HubError(404, "NotFound", f"{method} {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self.reply({"error": str(error)}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.server.log.append([self.command, self.path, status])
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        repo = self.server.repos.get(repo_id)
        if write and not self.is_known():
            raise HubError(401, "Unauthorized", "Invalid credentials in Authorization header")
        if repo is None or (repo.private and not self.is_known()):
            raise HubError(404, "RepoNotFound", "Repository not found")
        return repo

    # --- routes ------------------------------------------------------------------------------------------------------

    def show_log(self) -> None:
        self.reply(self.server.log)

    def whoami(self) -> None:
        if not self.is_known():
            raise HubError(401, "Unauthorized", "Invalid credentials in Authorization header")
        self.reply({"type": "user", "name": "user", "orgs": [], "auth": {}})

    def validate(self) -> None:
        errors = metadata_errors(json.loads(self.body)["content"])
        self.reply("; ".join(errors).encode() or {"errors": [], "warnings": []}, 400 if errors else 200)

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        url = {"url": f"{self.server.url}/{repo_id}"}
        if not self.is_known():
            raise HubError(401, "Unauthorized", "Invalid credentials in Authorization header")
        exists = repo_id in self.server.repos
        if not exists:
            self.server.repos[repo_id] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.reply(url, 409 if exists else 200)

    def info(self, repo_id: str, revision: str | None) -> None:
        repo = self.repo(repo_id)
        sha = repo.resolve(revision or "main")
        files = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        self.reply({"id": repo_id, "sha": sha, "private": repo.private, "tags": [], "siblings": files})

    def create_branch(self, repo_id: str, branch: str) -> None:
        repo = self.repo(repo_id, write=True)
        if branch in repo.branches:
            raise HubError(409, "Conflict", "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self.reply({})

    def tree(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id)
        files = repo.commits[repo.resolve(revision)]
        self.reply([self.entry(path, content) for path, content in sorted(files.items())])

    def paths_info(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id)
        files = repo.commits[repo.resolve(revision)]
        self.reply([self.entry(path, files[path]) for path in json.loads(self.body)["paths"] if path in files])

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        size, oid = len(content), object_id(path, content)
        lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 134}} if is_lfs(path) else {}
        return {"type": "file", "path": path, "size": size, "oid": oid, **lfs}

    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, write=True)
        there = repo.commits[repo.resolve(revision)]
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            known = {"oid": object_id(path, there[path])} if path in there else {}
            mode = "lfs" if is_lfs(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self.reply({"files": files, "commitOid": repo.resolve(revision)})

    def lfs_batch(self, repo_id: str) -> None:
        self.repo(repo_id, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/_lfs/{wanted['oid']}"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.server.lfs else {"actions": upload})})
        self.reply({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "BadRequest", "The content does not have this SHA-256.")
        self.server.lfs[oid] = self.body
        self.reply({}, headers={"ETag": f'"{oid}"'})

    def commit(self, repo_id: str, branch: str) -> None:
        repo = self.repo(repo_id, write=True)
        head = repo.resolve(branch)
        files = dict(repo.commits[head])
        for line in self.body.splitlines():
            step = json.loads(line)
            key, value = step["key"], step["value"]
            if key == "header" and value.get("parentCommit") not in (None, head):
                raise HubError(412, "PreconditionFailed", "A commit has happened since.")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if key == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
            if key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(branch, files)
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}"})

    def download(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.repo(repo_id)
        sha = repo.resolve(revision)
        content = repo.commits[sha].get(path)
        if content is None:
            self.reply({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        self.reply(content, headers={"X-Repo-Commit": sha, "ETag": f'"{object_id(path, content)}"'})


MODEL = r"/api/models/([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/_log", Handler.show_log),
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", r"/api/repos/create", Handler.create),
    ("GET", MODEL + r"(?:/revision/(.+))?", Handler.info),
    ("POST", MODEL + r"/branch/(.+)", Handler.create_branch),
    ("GET", MODEL + r"/tree/([^/]+)", Handler.tree),
    ("POST", MODEL + r"/paths-info/([^/]+)", Handler.paths_info),
    ("POST", MODEL + r"/preupload/(.+)", Handler.preupload),
    ("POST", MODEL + r"/commit/(.+)", Handler.commit),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/_lfs/(\w+)", Handler.lfs_put),
    ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.download),
]


if __name__ == "__main__":
    hub = Hub(sys.argv[1])
    sys.stdout.write(hub.url + "\n")
    sys.stdout.flush()
    hub.serve_forever()
