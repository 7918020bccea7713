"""Object stores that several test modules use, started once and only if a test asks."""

import pytest

from tests.object_stores import FaultyProxy, ObjectServer, faulty_proxy, google_server, s3_server


@pytest.fixture(scope="session")
def _google(tmp_path_factory):
    with google_server(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture(scope="session")
def _s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


class Store:
    """A real object store behind a proxy; `folder` is a URI that nobody else uses."""

    def __init__(self, server: ObjectServer, proxy: FaultyProxy, folder: str) -> None:
        self.server, self.proxy, self.folder = server, proxy, folder

    def put(self, files: dict[str, bytes]) -> None:
        """Write objects as another program would."""
        from kubegraft.storage.objects import opened_store
        from kubegraft.storage.retries import Retries

        with opened_store(self.folder, Retries()) as (store, key):
            for name, content in files.items():
                store.write(f"{key}/{name}", content)
        self.proxy.requests.clear()

    def keys(self) -> list[str]:
        """Return all keys under the folder, relative to it."""
        from kubegraft.storage.objects import list_objects, opened_store
        from kubegraft.storage.retries import Retries

        with opened_store(self.folder, Retries()) as (store, key):
            listed = list_objects(store, f"{key}/", "", Retries())
            found = [item.key.removeprefix(f"{key}/") for item in listed]
        self.proxy.requests.clear()
        return sorted(found)


@pytest.fixture(params=["gs", "s3"])
def object_store(request, monkeypatch, tmp_path_factory):
    """Give a `Store` of each kind, reached as a user reaches it: through environment variables."""
    server = request.getfixturevalue({"gs": "_google", "s3": "_s3"}[request.param])
    name = tmp_path_factory.mktemp("folder").name
    with faulty_proxy(server.port) as (proxy, port):
        for variable, value in server.environment(port).items():
            monkeypatch.setenv(variable, value)
        yield Store(server, proxy, f"{server.scheme}://bucket/{name}")
