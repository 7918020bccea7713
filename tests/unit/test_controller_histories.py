"""Random histories: whatever the operator misses, reads late or leaves half done, a job ends as if it had not.

After Sun et al. 2022, "Automatic Reliability Testing for Cluster Management Controllers" (Sieve): a crash between any
two actions, stale reads (each kind of object apart, also older than what was seen before), missed events.
"""

import dataclasses
import functools
import random

import pytest

from tests.controller_world import (
    BAD_CONFIG,
    BAD_DATA,
    CRASH,
    DIVERGED,
    FULL_DISK,
    HANGS,
    KILLED,
    NODE_LOST,
    OUT_OF_MEMORY,
    PEER_LOST,
    VANISHED,
    WELL,
    Fate,
    World,
    fate_table,
    operate_fresh,
    operate_perturbed,
    settle,
    statuses,
    transfer_job,
)

NUM_HISTORIES = 2000
SHARDS = 4
ENDLESS = ("train", -1, HANGS)
STUCK = (("train", -1, PEER_LOST), ("train", -1, KILLED), ("train", -1, VANISHED))
FAULTS = (
    ("prepare", 0, CRASH),
    ("prepare", 0, NODE_LOST),
    ("prepare", -1, BAD_CONFIG),
    ("prepare", -1, BAD_DATA),
    ("prepare", 1, BAD_DATA),
    ("train", 0, PEER_LOST),
    ("train", 0, NODE_LOST),
    ("train", 1, NODE_LOST),
    ("train", 0, CRASH),
    ("train", 0, KILLED),
    ("train", 1, KILLED),
    ("train", 0, VANISHED),
    ("prepare", -1, OUT_OF_MEMORY),
    ("train", -1, OUT_OF_MEMORY),
    ("train", -1, FULL_DISK),
    ("train", -1, CRASH),
    ("train", -1, DIVERGED),
    ("finish", 0, NODE_LOST),
    ("finish", 0, CRASH),
    ("finish", -1, OUT_OF_MEMORY),
    ("finish", -1, Fate(exit_code=7, error="ExportError", message="The export answers otherwise.")),
)
# What the operator ends, and a JobSet would try once more while it is away; so restarts depend on when it looks.
ENDED_BY_OPERATOR = (DIVERGED, OUT_OF_MEMORY)
WHEN_SEEN = ("TrainingDiverged", "OutOfMemory", "NoProgress")


DEPENDS_ON_LOOKS = (
    "jobSetUid",
    "startTime",
    "completionTime",
    "acceleratorHours",
    "earlierAcceleratorHours",
    "restartsWithoutProgress",
    "exactProgress",
    "lastEnds",
)


@dataclasses.dataclass(frozen=True)
class Story:
    """What happens to a job whatever its operator does."""

    faults: tuple[tuple[str, int, Fate], ...]
    spec: tuple[tuple[str, object], ...]
    suspensions: tuple[int, ...]  # steps at which people suspend it and, in turn, let it go on


def random_story(rng: random.Random) -> Story:
    faults = tuple(rng.sample(FAULTS, rng.choice((0, 0, 1, 1, 2, 3))))
    spec: dict[str, object] = {"nodes": rng.choice((1, 2)), "maxRestarts": rng.choice((0, 2))}
    if rng.random() < 0.3:
        spec["queueName"] = "queue"
    if rng.random() < 0.2:
        spec["ttlSecondsAfterFinished"] = rng.choice((0, 30))
    if any(
        fate in ENDED_BY_OPERATOR for _, _, fate in faults
    ):  # else other ends come first, where it is away
        faults = tuple(each for each in faults if each[1] == 0 or each[2] in ENDED_BY_OPERATOR)
    if rng.random() < 0.1:
        faults, spec = (ENDLESS,), {**spec, "activeDeadlineSeconds": 90}
    elif rng.random() < 0.03:
        faults = (rng.choice(STUCK),)
    suspensions: tuple[int, ...] = ()
    # A JobSet that was in a queue and suspended is made anew, and its last restarts may be ones that nobody saw.
    if rng.random() < 0.3 and not (faults and "queueName" in spec):
        suspensions = tuple(sorted(rng.sample(range(1, 23), 2)))
    return Story(faults, tuple(sorted(spec.items())), suspensions)


def beginning(story: Story) -> World:
    world = World(fate=fate_table(story.faults))
    world.put(transfer_job(**dict(story.spec)))
    return world


def people_act(world: World, story: Story, step: int) -> None:
    for index, at in enumerate(story.suspensions):
        if at == step:
            world.change_spec(suspend=index % 2 == 0)


def ending(world: World) -> dict:
    """Return what must be the same: all of a job's status but times and what depends on when it was looked at."""
    job = world.get("TransferJob")
    if job is None:
        return {"objects": sorted(world.objects)}
    status = dict(job["status"])
    conditions = list(statuses(status.pop("conditions")))
    for name in DEPENDS_ON_LOOKS:
        status.pop(name, None)
    kinds = sorted(key for key in world.objects if key[0] in ("TransferJob", "ConfigMap"))
    failed = next((reason for kind, _, reason, _ in conditions if kind == "Failed"), "")
    live = [each for each in world.of_kind("JobSet") if not each.get("status", {}).get("terminalState")]
    assert not live, "a JobSet that goes on without its job"
    if failed:  # how far it was seen to come, before it failed, may differ
        for name in ("stage", "progress", "metrics", "datasetDigest"):
            status.pop(name, None)
    else:
        kinds += [("JobSet", each["metadata"]["name"]) for each in world.of_kind("JobSet")]
    if failed in WHEN_SEEN:
        del status["restarts"], status["uncountedRestarts"]
        conditions = [condition[:3] for condition in conditions]
    return {"objects": kinds, "status": status, "conditions": conditions}


@functools.cache
def undisturbed(story: Story) -> dict:
    world = beginning(story)
    for step in range(24):
        people_act(world, story, step)
        operate_fresh(world)
        world.admit()
        world.step()
    settle(world)
    return ending(world)


def disturbed(story: Story, rng: random.Random) -> World:
    world = beginning(story)
    for step in range(24):
        people_act(world, story, step)
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):  # none: all events were missed
            operate_perturbed(world, rng)
        if rng.random() < 0.7:
            world.admit()
        if rng.random() < 0.8:
            world.step()
    settle(world)
    return world


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_job_ends_the_same_way_whatever_its_operator_misses(shard):
    for seed in range(shard, NUM_HISTORIES, SHARDS):
        rng = random.Random(seed)
        story = random_story(rng)
        world = disturbed(story, rng)
        assert ending(world) == undisturbed(story), f"seed {seed}: {story}"
        most = 30 + 2 * len(story.suspensions) + (60 if story.faults and story.faults[0] in STUCK else 0)
        assert world.writes <= most, f"seed {seed}: {world.writes} writes, {story}"


@pytest.mark.parametrize("fault", STUCK)
def test_uncounted_restarts_that_lead_nowhere_end(fault):
    world = beginning(Story((fault,), (("maxRestarts", 0), ("nodes", 2)), ()))
    settle(world)
    status = world.get("TransferJob")["status"]
    (failed,) = [each for each in status["conditions"] if each["type"] == "Failed"]
    assert failed["reason"] == "NoProgress"
    assert status["restarts"] == status["uncountedRestarts"] == 11
    assert status["restartsWithoutProgress"] == 11
    assert "10 times in a row" in failed["message"]
    assert "fine_tune" in failed["message"]
    assert ("nothing is left" if fault[2] is VANISHED else str(fault[2].exit_code)) in failed["message"]


@pytest.mark.parametrize(
    ("gang", "counted"),
    [
        ((CRASH, PEER_LOST), 1),
        ((PEER_LOST, CRASH), 1),
        ((FULL_DISK, KILLED), 1),
        ((KILLED, PEER_LOST), 0),
        ((NODE_LOST, PEER_LOST), 0),
        ((VANISHED, PEER_LOST), 0),
        ((VANISHED, CRASH), 1),
    ],
)
def test_only_errors_of_the_program_count_whichever_worker_they_meet(gang, counted):
    world = World(fate=lambda role, attempt, index: gang[index] if (role, attempt) == ("train", 0) else WELL)
    world.put(transfer_job(nodes=2))
    settle(world)
    (jobset,) = world.of_kind("JobSet")
    assert (jobset["status"]["restarts"], jobset["status"]["restartsCountTowardsMax"]) == (1, counted)
    status = world.get("TransferJob")["status"]
    assert (status["restarts"], status["uncountedRestarts"]) == (1, 1 - counted)
    assert status["progress"] == 100
