"""Of several replicas one works; the next one does as soon as it ends, and after a while when it is lost."""

import asyncio
import contextlib

import pytest

from kubegraft.controller.access import Access, from_kubeconfig
from kubegraft.controller.api import Api
from kubegraft.controller.leader import Leader
from kubegraft.controller.metrics import Metrics
from kubegraft.errors import EnvironmentFault
from tests.kubernetes_standin import Standin

SECONDS = 0.4


@pytest.fixture
def standin():
    with Standin().running() as standin:
        yield standin


@contextlib.asynccontextmanager
async def replicas(standin, *names):
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(Api(Access(server=standin.url), Metrics()))
        yield [Leader(api=api, namespace="operator", identity=name, seconds=SECONDS) for name in names]


def run(test):
    asyncio.run(asyncio.wait_for(test(), timeout=30))


def holder(standin):
    return standin.get("leases", "operator", "kubegraft-operator")["spec"]["holderIdentity"]


def test_the_second_waits_until_the_first_gives_the_lease_back(standin):
    async def test():
        async with replicas(standin, "first", "second") as (first, second):
            await first.acquire()
            kept = asyncio.create_task(first.keep())
            waiting = asyncio.create_task(second.acquire())
            await asyncio.wait({waiting}, timeout=SECONDS * 2)
            assert not waiting.done()
            assert holder(standin) == "first"
            kept.cancel()
            await first.give_back()
            await waiting
            assert holder(standin) == "second"
            assert standin.get("leases", "operator", "kubegraft-operator")["spec"]["leaseTransitions"] == 1

    run(test)


def test_a_lost_replica_is_succeeded_when_its_lease_has_run_out(standin):
    async def test():
        async with replicas(standin, "first", "second") as (first, second):
            await first.acquire()
            await second.acquire()
            assert holder(standin) == "second"
            await first.keep()  # ends: another one has it
            await first.give_back()  # which is not the first's to give
            assert holder(standin) == "second"

    run(test)


def test_whoever_can_not_renew_stops_before_another_may_start(standin):
    async def test():
        async with replicas(standin, "first") as (first,):
            await first.acquire()
            standin.refuse["get", "leases"] = (500, "InternalError", "etcd is gone")
            began = asyncio.get_running_loop().time()
            await first.keep()
            assert asyncio.get_running_loop().time() - began < SECONDS * 2

    run(test)


def test_a_restarted_replica_of_the_same_name_goes_on(standin):
    async def test():
        async with replicas(standin, "pod-0", "pod-0") as (before, after):
            await before.acquire()
            await after.acquire()
            assert holder(standin) == "pod-0"

    run(test)


def test_a_kubeconfig_s_token_and_server_are_used():
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "team"}}],
        "clusters": [{"name": "k", "cluster": {"server": "http://127.0.0.1:1/"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    access = from_kubeconfig(config)
    assert (access.server, access.bearer(), access.namespace) == ("http://127.0.0.1:1", "t", "team")
    config["users"][0]["user"] = {"exec": {"command": "login"}}
    with pytest.raises(EnvironmentFault, match="token or a client certificate"):
        from_kubeconfig(config)


def test_a_token_that_was_renewed_is_read_again(tmp_path):
    path = tmp_path / "token"
    path.write_text("old\n")
    access = Access(server="https://x", token_path=str(path))
    assert access.bearer() == "old"
    path.write_text("new\n")
    assert access.bearer() == "new"
