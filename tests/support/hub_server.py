"""A Hugging Face Hub on loopback, as far as publishing and loading a model need one; repositories are kept in memory.

with HubServer(token="hf_...", user="alice") as hub:
    hub.fail("PUT", "/lfs/", status=500)   # the next request of that kind; cut=True hangs up in its middle
    ...                                    # a client whose HF_ENDPOINT is hub.url
    hub.files("alice/model")               # {path: bytes} on main
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # huggingface_hub itself needs it

LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "other"}
REPO_ID = r"[\w.-]+(?:/[\w.-]+)?"
# what the Hub takes for the type of a data set in a model-index
DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)


@dataclass
class Repo:
    """Commits by their hashes, each all of its files; branches point to them."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)

    def commit(self, branch: str | None, files: dict[str, bytes]) -> str:
        listing = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        sha = hashlib.sha1(f"{len(self.commits)} {listing}".encode()).hexdigest()
        self.commits[sha] = files
        if branch is None:
            self.pull_requests.append(sha)
        else:
            self.branches[branch] = sha
        return sha


@dataclass
class Fault:
    method: str
    path: str
    status: int | None
    times: int


class HubServer:
    """The server; a context manager that runs it in a thread.

    Args:
        token: the one that is valid.
        user: whose it is.
        role: what the token may do, "write", "read" or "fineGrained"; the last is told in `scopes`, permissions by
            the name of a repository or of its owner.
    """

    def __init__(self, token: str, user: str = "alice", role: str = "write") -> None:
        self.token, self.user, self.role = token, user, role
        self.scopes: dict[str, list[str]] = {}
        self.datasets = {"uoft-cs/cifar10", "scene/parse", "sayakpaul/nyu_depth_v2"}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, path: str, *, status: int | None = None, times: int = 1) -> None:
        """The next requests whose path matches are answered with that status, or cut off in the middle if None."""
        self.faults.append(Fault(method, path, status, times))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content of a repository, without what the Hub puts there itself."""
        repo = self.repos[repo_id]
        files = repo.commits[repo.branches.get(revision, revision)]
        return {path: data for path, data in files.items() if path != ".gitattributes"}


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        fault = next((f for f in self.hub.faults if f.times and f.method == self.command and f.path in url.path), None)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None:
            fault.times -= 1
            if fault.status is None:
                self.rfile.read(length // 2)
                self.close_connection = True
                self.connection.close()
                return
        self.body = (
            self._read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        )
        try:
            if fault is not None:
                raise _Refusal(fault.status, f"refused with {fault.status}")
            for method, pattern, action in _ROUTES:
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, url.path)):
                    return action(self, *map(unquote, match.groups()))
            raise _Refusal(404, "no such address")
        except _Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            errors = {"error": refusal.message, "errors": [{"message": refusal.message}], "url": self.hub.url}
            self._send(errors, refusal.status, headers)

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _may(self, action: str, repo_id: str = "") -> None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise _Refusal(401, "Invalid credentials in Authorization header")
        owner = repo_id.partition("/")[0]
        if action == "write" and (self.hub.role == "read" or owner != self.hub.user):
            raise _Refusal(403, "You don't have the required rights")
        granted = [*self.hub.scopes.get(repo_id, []), *self.hub.scopes.get(owner, [])]
        if action == "write" and self.hub.role == "fineGrained" and "repo.write" not in granted:
            raise _Refusal(403, "the token has no write access to this repository")

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is not None and repo.private:
            self._may("read")
        if repo is None:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def _commit_of(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(repo_id)
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def whoami(self) -> None:
        self._may("read")
        orgs = [{"name": "readers", "roleInOrg": "read"}]
        token: dict[str, Any] = {"role": self.hub.role}
        if self.hub.role == "fineGrained":
            scoped = [
                {
                    "entity": {"_id": "0", "type": "model" if "/" in name else "user", "name": name},
                    "permissions": granted,
                }
                for name, granted in self.hub.scopes.items()
            ]
            token["fineGrained"] = {"scoped": scoped, "global": ["discussion.write"]}
        self._send({"name": self.hub.user, "orgs": orgs, "auth": {"accessToken": token}})

    def dataset_info(self, repo_id: str) -> None:
        if repo_id not in self.hub.datasets:
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        self._send({"id": repo_id, "sha": "0" * 40, "siblings": []})

    def create_repo(self) -> None:
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or self.hub.user}/{request['name']}"
        self._may("write", repo_id)
        if repo_id in self.hub.repos:
            raise _Refusal(409, "You already created this model repo")
        repo = self.hub.repos[repo_id] = Repo(bool(request.get("private")) or request.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self._send({"url": f"{self.hub.url}/{repo_id}"})

    def create_branch(self, repo_id: str, branch: str) -> None:
        self._may("write", repo_id)
        repo = self._repo(repo_id)
        repo.branches[branch] = json.loads(self.body).get("startingPoint") or repo.branches["main"]
        self._send({})

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        sha, files = self._commit_of(repo_id, revision)
        siblings = [{"rfilename": path} for path in files]
        private = self.hub.repos[repo_id].private
        self._send({"id": repo_id, "modelId": repo_id, "sha": sha, "private": private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        _, files = self._commit_of(repo_id, revision)
        self._send([{"type": "file", "path": p, "size": len(d), "oid": _git_oid(d)} for p, d in files.items()])

    def validate_yaml(self) -> None:
        if problem := front_matter_problem(json.loads(self.body)["content"]):
            raise _Refusal(400, problem)
        self._send({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        self._may("read" if "create_pr" in self.query else "write", repo_id)
        _, files = self._commit_of(repo_id, revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            path, is_lfs = file["path"], file["path"].endswith((".safetensors", ".png"))
            there = files.get(path)
            oid = None if there is None else hashlib.sha256(there).hexdigest() if is_lfs else _git_oid(there)
            mode = "lfs" if is_lfs else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send({"files": answer})

    def lfs_batch(self, repo_id: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            href = f"{self.hub.url}/lfs/{wanted['oid']}?X-Amz-Signature=signature-of-the-upload"
            actions = {} if wanted["oid"] in self.hub.blobs else {"actions": {"upload": {"href": href}}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | actions)
        self._send({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "the content is not that of the address")
        self.hub.blobs[oid] = self.body
        self._send({})

    def commit(self, repo_id: str, revision: str) -> None:
        as_pull_request = "create_pr" in self.query
        self._may("read" if as_pull_request else "write", repo_id)
        parent, files = self._commit_of(repo_id, revision)
        files = dict(files)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", parent) != parent:
                raise _Refusal(412, "A commit has happened since")
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            if item["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.repos[repo_id].commit(None if as_pull_request else revision, files)
        urls = {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha}
        self._send(urls | {"pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/1"})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha, files = self._commit_of(repo_id, revision)
        if path not in files:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        data = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_git_oid(data)}"', "Accept-Ranges": "bytes"}
        if path.endswith(".safetensors"):
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._send(data[start : end + 1], 206, headers)
        self._send(data, 200, headers)


_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/({REPO_ID})/revision/([^/]+)", _Handler.model_info),
    ("GET", rf"/api/models/({REPO_ID})/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/api/models/({REPO_ID})", _Handler.model_info),
    ("GET", rf"/api/datasets/({REPO_ID})", _Handler.dataset_info),
    ("POST", rf"/api/models/({REPO_ID})/branch/([^/]+)", _Handler.create_branch),
    ("POST", rf"/api/models/({REPO_ID})/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/({REPO_ID})/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/({REPO_ID})\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("GET", rf"/({REPO_ID})/resolve/([^/]+)/(.+)", _Handler.resolve),
]


def front_matter_problem(content: str) -> str | None:
    """What the Hub's validator would refuse a model card for; the rules of its documentation, None if it is valid."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        data = None
    if not isinstance(data, dict):
        return "the YAML metadata is missing or malformed"
    if data.get("license") not in LICENSES:
        return '"license" must be one of the known identifiers'
    if not re.match(r"https://|LICENSE(\.md)?$", data.get("license_link", "LICENSE")):
        return '"license_link" must be an address or LICENSE'
    for name in ("base_model", "datasets"):
        values = data.get(name, [])
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(REPO_ID, value):
                return f'"{name}" with value "{value}" is not valid'
    for name in ("tags", "metrics"):
        if not all(isinstance(value, str) for value in data.get(name, [])):
            return f'"{name}" must be a list of strings'
    for model in data.get("model-index", []):
        if not model.get("name") or not isinstance(model.get("results"), list):
            return '"model-index[0]" needs a name and results'
        for result in model["results"]:
            dataset = result.get("dataset", {})
            if not result.get("task", {}).get("type") or not dataset.get("type") or not dataset.get("name"):
                return '"model-index[0].results[0]" needs the type of task and dataset, and the name of the dataset'
            if not DATASET_TYPE.fullmatch(dataset["type"]):
                return f'"model-index[0].results[0].dataset.type" with value "{dataset["type"]}" is not valid'
            if not result.get("metrics") or any({"type", "value"} - metric.keys() for metric in result["metrics"]):
                return '"model-index[0].results[0].metrics" needs types and values'
    return None


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
