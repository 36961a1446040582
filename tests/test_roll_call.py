"""Ranks that are missing or not alike are named, on rank 0 and on the others."""

import json
import threading

import pytest
import torch.distributed as dist

from graphtune.errors import UserError
from graphtune.roll_call import call, connect

FACTS = {"version of torch": "2.0", "optimizer.lr": "0.1"}


def call_all(monkeypatch: pytest.MonkeyPatch, facts: list[dict[str, str] | None]) -> list[str]:
    """What each rank is told, or that all is well; None is a rank that does not call."""
    store = dist.HashStore()
    told = ["well"] * len(facts)
    monkeypatch.setattr("graphtune.roll_call.world", lambda: (place.rank, len(facts)))
    place = threading.local()

    def rank(number: int) -> None:
        place.rank = number
        try:
            call(store, facts[number] or {}, 2)
        except UserError as error:
            told[number] = str(error)

    threads = [threading.Thread(target=rank, args=(n,)) for n, f in enumerate(facts) if f]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    return told


def test_ranks_that_are_alike_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call_all(monkeypatch, [FACTS, FACTS, FACTS]) == ["well"] * 3


def test_what_differs_is_told_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**FACTS, "version of torch": "1.0"}
    for message in call_all(monkeypatch, [FACTS, FACTS, other]):
        assert "`version of torch` is 2.0 on rank 0, 1.0 on rank 2" in message
    more = {**FACTS, "passes.fsdp": "{}"}
    for message in call_all(monkeypatch, [FACTS, more]):
        assert "`passes.fsdp` is absent on rank 0, {} on rank 1" in message


def test_missing_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told = call_all(monkeypatch, [FACTS, None, FACTS, None])
    for rank in (0, 2):
        assert "no sign of rank 1, 3 of 4 in `mesh.timeout_s=2`" in told[rank]


def test_what_others_say_names_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    store.set("rank-1", json.dumps({"host": "node7", "facts": {}}))
    store.set("read-1", "")
    monkeypatch.setattr("graphtune.roll_call.world", lambda: (0, 2))
    with pytest.raises(UserError, match="node7"):
        call(store, FACTS, 2)


def test_a_launcher_that_says_too_little_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE=2 without MASTER_ADDR"):
        connect(1)
