"""A Kubeflow Pipelines installation: its API, and what its UI shows beside it.

The API of KFP 2.17 knows a run's tasks and their states. It has no artifacts, metrics and logs, and does not say which
task the cache answered: the UI takes those from ML Metadata (gRPC-web), the object store and the pods, all through its
own address. So does this, which is why the endpoint must be the UI's, as in docs/operations.md.
"""

import json
import os
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import json_format, struct_pb2

from kubegraft.kfp_client.connection import Connection, open_client
from tests.e2e.kube import Refused, run

ENDED = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
POLL_SECONDS = 5
LOST_POLLS = 12  # a port-forward is started again within a minute, or not at all
GRPC_WEB = "application/grpc-web+proto"
STATES = ("UNKNOWN", "NEW", "RUNNING", "COMPLETE", "FAILED", "CACHED", "CANCELED")  # of an execution
OUTPUT = 4  # type of an event


@dataclass(frozen=True)
class Artifact:
    uri: str
    metadata: dict


@dataclass(frozen=True)
class Task:
    state: str
    pod: str
    namespace: str
    artifacts: dict[str, Artifact]


class Installation:
    """What `KUBEGRAFT_KFP_ENDPOINT` leads to; the other variables are those of `kubegraft submit`."""

    def __init__(self) -> None:
        self.endpoint = os.environ["KUBEGRAFT_KFP_ENDPOINT"].rstrip("/")
        self.namespace = os.environ.get("KUBEGRAFT_KFP_NAMESPACE", "")
        self.token_file = os.environ.get("KUBEGRAFT_KFP_TOKEN_FILE", "")
        self.client = open_client(
            Connection(endpoint=self.endpoint, namespace=self.namespace, token_file=self.token_file)
        )

    # The API

    def wait(self, run_id: str, *, seconds: float):
        """Return a run that has ended; fail with its story if it does not end."""
        deadline = time.monotonic() + seconds
        while (found := self.look(run_id)).state not in ENDED:
            assert time.monotonic() < deadline, f"not over after {seconds:.0f} s\n{self.story(run_id)}"
            time.sleep(POLL_SECONDS)
        return found

    def look(self, run_id: str):
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        for attempt in range(1, LOST_POLLS + 1):
            try:
                return self.client.get_run(run_id)
            except (ApiException, HTTPError):
                if attempt == LOST_POLLS:
                    raise
                time.sleep(POLL_SECONDS)
        raise AssertionError

    def task_states(self, run_id: str) -> dict[str, str]:
        """Return the states that the API gives: of tasks, and of drivers and executors under names of their own."""
        details = self.look(run_id).run_details
        return {one.display_name: str(one.state) for one in (details.task_details if details else None) or ()}

    def runs(self, experiment_id: str) -> list:
        """Return the newest 100 runs of an experiment."""
        listed = self.client.list_runs(
            experiment_id=experiment_id,
            page_size=100,
            sort_by="created_at desc",
            namespace=self.namespace or None,
        )
        return list(listed.runs or ())

    def versions(self, pipeline_id: str) -> list:
        return list(self.client.list_pipeline_versions(pipeline_id, page_size=100).pipeline_versions or ())

    def story(self, run_id: str) -> str:
        """Return what a person would look at when a run does not do as it should."""
        parts = [f"{self.endpoint}/#/runs/details/{run_id}", f"run: {self.look(run_id).state}"]
        parts += [f"  {name}: {state}" for name, state in self.task_states(run_id).items()]
        try:
            tasks = self.tasks(run_id)
        except (AssertionError, OSError) as error:
            return "\n".join([*parts, str(error)])
        for name, task in tasks.items():
            parts.append(f"{name}: {task.state}, pod {task.pod or 'none'} in {task.namespace or '?'}")
            if task.pod and task.state != "COMPLETE":
                parts.append(self.log(task)[-3000:])
        return "\n".join(parts)

    # What the UI shows beside it

    def tasks(self, run_id: str) -> dict[str, Task]:
        """Return a run's tasks as ML Metadata has them, by name; `CACHED` is a state."""
        found = self._metadata("GetContextByTypeAndName", _text(1, "system.PipelineRun") + _text(2, run_id))
        assert found[1], f"ML Metadata knows no run {run_id}: did its first driver start?"
        context = _number(1, _fields(found[1][0])[1][0])
        executions = [_fields(one) for one in self._metadata("GetExecutionsByContext", context)[1]]
        artifacts = {
            one[1][0]: Artifact(_string(one, 3), _properties(one[5]))
            for one in map(_fields, self._metadata("GetArtifactsByContext", context)[1])
        }
        ids = b"".join(_number(1, one[1][0]) for one in executions)
        outputs = defaultdict(dict)
        for event in map(_fields, self._metadata("GetEventsByExecutionIDs", ids)[1] if ids else []):
            if event[4] == [OUTPUT] and event[1][0] in artifacts:
                (key, *_) = _fields(_fields(event[3][0])[1][0])[2]
                outputs[event[2][0]][key.decode()] = artifacts[event[1][0]]
        tasks = {}
        for execution in sorted(executions, key=lambda one: one[1][0]):
            about = _properties(execution[5])
            name = about.get("task_name") or about.get("display_name") or ""
            state = STATES[execution[3][0] if execution[3] else 0]
            where = (str(about.get("pod_name", "")), str(about.get("namespace", "")))
            tasks[name] = Task(state, *where, outputs[execution[1][0]])
        return tasks

    def content(self, artifact: Artifact) -> str:
        """Return the text of an artifact that is one file."""
        parts = urllib.parse.urlsplit(artifact.uri)
        query = {"source": parts.scheme, "bucket": parts.netloc, "key": parts.path.lstrip("/")}
        query |= {"namespace": self.namespace} if self.namespace else {}
        session = artifact.metadata.get("store_session_info")
        # A root of one's own needs the settings that it was written with; the default one may refuse to be given any.
        attempts = [query, {**query, "providerInfo": session}] if session else [query]
        for number, attempt in enumerate(attempts):
            try:
                return self._get(f"/artifacts/get?{urllib.parse.urlencode(attempt)}").decode()
            except AssertionError:
                if number + 1 == len(attempts):
                    raise
        raise AssertionError

    def log(self, task: Task) -> str:
        """Return the log of a task's pod from the UI, or from kubectl where that is of the same cluster."""
        query = urllib.parse.urlencode({"podname": task.pod, "podnamespace": task.namespace})
        try:
            return self._get(f"/k8s/pod/logs?{query}").decode()
        except AssertionError as refusal:
            try:
                return run(
                    ["kubectl", "--namespace", task.namespace, "logs", task.pod, "--container", "main"]
                )
            except (Refused, OSError) as error:
                raise AssertionError(f"{refusal}\nkubectl has no log either: {error}") from error

    def _metadata(self, method: str, request: bytes) -> dict[int, list]:
        """Return the fields of the answer to one call of ML Metadata, in gRPC-web's frames."""
        frame = struct.pack(">BI", 0, len(request)) + request
        headers = {"Content-Type": GRPC_WEB, "Accept": GRPC_WEB, "X-Grpc-Web": "1"}
        body = self._get(f"/ml_metadata.MetadataStoreService/{method}", frame, headers)
        message, position = None, 0
        while position + 5 <= len(body):
            kind, size = struct.unpack_from(">BI", body, position)
            position += 5 + size
            content = body[position - size : position]
            if kind == 0:
                message = content
            elif b"grpc-status:0" not in content.replace(b" ", b"").lower():
                raise AssertionError(f"ML Metadata refused {method}: {content.decode(errors='replace')}")
        assert message is not None, (
            f"ML Metadata did not answer {method}. Received: {body[:200]!r} from {self.endpoint}. "
            "KUBEGRAFT_KFP_ENDPOINT must lead to the UI (service ml-pipeline-ui)."
        )
        return _fields(message)

    def _get(self, path: str, body: bytes | None = None, headers: dict | None = None) -> bytes:
        """Return what stands below the endpoint, or below its host: a full Kubeflow serves some paths there."""
        url = urllib.parse.urlsplit(self.endpoint)
        refusals = []
        for base in dict.fromkeys((self.endpoint, f"{url.scheme}://{url.netloc}")):
            request = urllib.request.Request(
                base + path, data=body, headers={**(headers or {}), **self._who()}
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                refusals.append(f"status {error.code} at {base}{path}: {error.read(300)!r}")
                error.close()
        raise AssertionError(
            f"The UI must answer. Received: {'; '.join(refusals)}. KUBEGRAFT_KFP_ENDPOINT must lead to the UI "
            "(service ml-pipeline-ui), which passes calls of the API on."
        )

    def _who(self) -> dict[str, str]:
        scope = {"X-Kfp-Namespace": self.namespace} if self.namespace else {}
        if not self.token_file:
            return scope
        return {**scope, "Authorization": f"Bearer {Path(self.token_file).read_text().strip()}"}


# The few protobuf messages of ML Metadata (ml_metadata/proto/metadata_store.proto), by field number.


def _fields(message: bytes) -> dict[int, list]:
    """Return a message's fields: integers, and bytes for everything else."""
    found, position = defaultdict(list), 0
    while position < len(message):
        tag, position = _varint(message, position)
        size, value = {1: 8, 5: 4}.get(tag & 7, 0), None
        if tag & 7 == 0:
            value, position = _varint(message, position)
        elif tag & 7 == 2:
            size, position = _varint(message, position)
        found[tag >> 3].append(message[position : position + size] if value is None else value)
        position += size
    return found


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        shift, position = shift + 7, position + 1
        if byte < 128:
            return value, position


def _number(field: int, value: int) -> bytes:
    encoded = bytearray([field << 3])
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _text(field: int, value: str) -> bytes:
    content = value.encode()
    return bytes([field << 3 | 2, len(content)]) + content  # none is longer than 127 bytes


def _string(fields: dict[int, list], field: int) -> str:
    return fields[field][0].decode() if fields[field] else ""


def _properties(entries: list[bytes]) -> dict:
    """Return custom properties as plain values."""
    properties = {}
    for entry in map(_fields, entries):
        value = _fields(entry[2][0]) if entry[2] else {}
        properties[_string(entry, 1)] = _plain(value)
    return properties


def _plain(value: dict[int, list]) -> object:
    for field, content in value.items():
        if field == 2:
            return struct.unpack("<d", content[0])[0]
        if field == 3:
            return content[0].decode()
        if field == 4:
            return json.loads(json_format.MessageToJson(struct_pb2.Struct.FromString(content[0])))
        return bool(content[0]) if field == 6 else content[0]
    return None
