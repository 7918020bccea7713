"""A stand-in for the API server of Kubeflow Pipelines, on loopback.

It is not Kubeflow: it keeps what it is given in dictionaries and implements only the v2beta1 endpoints that
kubegraft calls, with the names and shapes of the OpenAPI that `kfp_server_api` was generated from. A real
`kfp.Client` talks to it over HTTP. What a real backend does beyond that is tested where
`KUBEGRAFT_KFP_ENDPOINT` is set (tests/e2e).
"""

import email
import email.policy
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml


class StandIn(ThreadingHTTPServer):
    """Server whose state is open to tests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.experiments, self.pipelines, self.versions = {}, {}, {}
        self.runs, self.recurring_runs = {}, {}
        self.calls, self.made = [], []
        self.multi_user = False
        self.token = None  # what callers must prove, where it is set
        self.failures = []  # (path pattern, status), each used up by one call
        self.run_states = [("PENDING", {}), ("SUCCEEDED", {})]  # shown one after the other, the last for ever
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def changes(self):
        """Calls that changed something, in order."""
        return list(self.made)

    def add(self, kind, prefix, values):
        identifier = f"{prefix}-{len(self.made) + 1}"
        self.made.append(f"create {prefix}")
        kind[identifier] = values
        return identifier


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_DELETE(self):
        self._answer("DELETE")

    def _answer(self, method):
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        with self.server.lock:
            self.server.calls.append((method, url.path, dict(self.headers)))
            status, document = self._result(method, url.path, query, body)
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _result(self, method, path, query, body):
        server = self.server
        if server.token and self.headers.get("authorization") != f"Bearer {server.token()}":
            return 401, {"message": "Unauthenticated"}
        for index, (pattern, status) in enumerate(server.failures):
            if re.search(pattern, path):
                del server.failures[index]
                return status, {"message": f"injected {status}"}
        for route_method, pattern, function in _ROUTES:
            match = re.fullmatch(f"/apis/v2beta1/{pattern}", path)
            if match and route_method == method:
                return function(server, match, query, body, self.headers)
        return 404, {"message": f"no route {method} {path}"}


def _filtered(items, query):
    if "filter" in query:
        (predicate,) = json.loads(query["filter"])["predicates"]
        assert predicate["operation"] == "EQUALS"
        items = [item for item in items if item[predicate["key"]] == predicate["stringValue"]]
    for key in ("namespace", "experiment_id"):
        if query.get(key):
            items = [item for item in items if item.get(key) == query[key]]
    return items


def _page(name, items, query):
    start, size = int(query.get("page_token") or 0), int(query.get("page_size") or 20)
    page = {name: items[start : start + size]} if items else {}
    return 200, page | ({"next_page_token": str(start + size)} if start + size < len(items) else {})


def _healthz(server, *_):
    return 200, {"multi_user": server.multi_user}


def _list_experiments(server, _, query, *__):
    return _page("experiments", _filtered(list(server.experiments.values()), query), query)


def _create_experiment(server, _, __, body, ___):
    experiment = json.loads(body)
    experiment["experiment_id"] = server.add(server.experiments, "experiment", experiment)
    return 200, experiment


def _list_pipelines(server, _, query, *__):
    return _page("pipelines", _filtered(list(server.pipelines.values()), query), query)


def _create_pipeline(server, _, __, body, ___):
    pipeline = json.loads(body)
    if any(other["name"] == pipeline["name"] for other in server.pipelines.values()):
        return 409, {"message": "Already exist error"}
    pipeline["pipeline_id"] = server.add(server.pipelines, "pipeline", pipeline)
    return 200, pipeline


def _list_versions(server, match, query, *_):
    versions = [v for v in server.versions.values() if v["pipeline_id"] == match[1]]
    return _page("pipeline_versions", _filtered(versions, query), query)


def _upload_version(server, _, query, body, headers):
    message = email.message_from_bytes(
        b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body, policy=email.policy.HTTP
    )
    (part,) = message.iter_parts()
    assert part.get_param("name", header="content-disposition") == "uploadfile"
    text = part.get_payload(decode=True).decode()
    if query["pipelineid"] not in server.pipelines:
        return 404, {"message": "pipeline not found"}
    version = {
        "pipeline_id": query["pipelineid"],
        "name": query["name"],
        "display_name": query.get("display_name", query["name"]),
        "description": query.get("description", ""),
        "pipeline_spec": next(iter(yaml.safe_load_all(text))),
    }
    version["pipeline_version_id"] = server.add(server.versions, "version", version)
    return 200, version


def _check_reference(server, body):
    reference = body["pipeline_version_reference"]
    versions = [v for v in server.versions.values() if v["pipeline_id"] == reference["pipeline_id"]]
    if "pipeline_version_id" in reference:
        versions = [v for v in versions if v["pipeline_version_id"] == reference["pipeline_version_id"]]
    known = versions[-1]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    unknown = body["runtime_config"].get("parameters", {}).keys() - known.keys()
    return f"unknown parameters {sorted(unknown)}" if unknown else ""


def _create_run(server, _, __, body, ___):
    run = json.loads(body)
    if wrong := _check_reference(server, run):
        return 400, {"message": wrong}
    run["looks"] = 0
    run["state"] = server.run_states[0][0]
    run["run_id"] = server.add(server.runs, "run", run)
    return 200, run


def _list_runs(server, _, query, *__):
    return _page("runs", _filtered(list(reversed(server.runs.values())), query), query)


def _get_run(server, match, *_):
    if match[1] not in server.runs:
        return 404, {"message": "run not found"}
    run = server.runs[match[1]]
    state, tasks = server.run_states[min(run["looks"], len(server.run_states) - 1)]
    run["looks"] += 1
    run["state"] = state
    run["run_details"] = {"task_details": [{"display_name": n, "state": s} for n, s in tasks.items()]}
    return 200, run


def _list_recurring(server, _, query, *__):
    return _page("recurringRuns", _filtered(list(server.recurring_runs.values()), query), query)


def _create_recurring(server, _, __, body, ___):
    recurring = json.loads(body)
    if wrong := _check_reference(server, recurring):
        return 400, {"message": wrong}
    recurring["status"] = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[recurring["mode"]]
    recurring["recurring_run_id"] = server.add(server.recurring_runs, "recurring", recurring)
    return 200, recurring


def _change_recurring(server, match, *_):
    server.made.append(f"{match[2]} recurring")
    server.recurring_runs[match[1]]["status"] = f"{match[2].upper()}D"
    return 200, {}


def _delete_recurring(server, match, *_):
    server.made.append("delete recurring")
    del server.recurring_runs[match[1]]
    return 200, {}


_ROUTES = (
    ("GET", "healthz", _healthz),
    ("GET", "experiments", _list_experiments),
    ("POST", "experiments", _create_experiment),
    ("GET", "pipelines", _list_pipelines),
    ("POST", "pipelines", _create_pipeline),
    ("GET", "pipelines/([^/]+)/versions", _list_versions),
    ("POST", "pipelines/upload_version", _upload_version),
    ("GET", "runs", _list_runs),
    ("POST", "runs", _create_run),
    ("GET", "runs/([^/:]+)", _get_run),
    ("GET", "recurringruns", _list_recurring),
    ("POST", "recurringruns", _create_recurring),
    ("POST", "recurringruns/([^/:]+):(enable|disable)", _change_recurring),
    ("DELETE", "recurringruns/([^/:]+)", _delete_recurring),
)
