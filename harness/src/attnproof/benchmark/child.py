"""The process that measures: ``python -m attnproof.benchmark.child``, a request on standard input.

It writes a JSON line for everything that is known, to a file: what it begins with, so that a parent
knows at what it died, and each measurement. Peers share it, since they are to take turns within
milliseconds; the parent starts it anew when it dies, without whoever killed it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..environment import environment
from ..targets import LoadError
from .ceilings import measure as measure_ceilings
from .peers import Peer, load_peer
from .rounds import measure
from .suites import SUITES


def main(request: Mapping[str, Any]) -> None:
    """Measure what is asked for: suite, dtype, device, peers (name and signature), rounds, seed,
    the cells that are ``finished`` and the pairs of cell and peer that are ``lost``."""
    device, dtype = request["device"], request["dtype"]
    with Path(request["file"]).open("a", encoding="utf-8") as file:

        def say(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        cells = [c for c in SUITES[request["suite"]](dtype) if c.id not in request["finished"]]
        ceilings = measure_ceilings(device, getattr(torch, request["torch_dtype"]))
        say(environment=environment(), ceilings={"flops": ceilings.flops, "bytes": ceilings.bytes})
        peers: list[Peer] = []
        for name, signature in request["peers"]:
            say(begins=name, cell=None)
            try:
                peers.append(load_peer(name, signature, device))
            except LoadError as error:
                say(unloadable=name, reason=str(error))
        for cell in cells:
            lost = {name for lost_cell, name in request["lost"] if lost_cell in (cell.id, None)}
            taking_part = [peer for peer in peers if peer.name not in lost]
            if taking_part:
                begins = partial(_begins, say, cell.id)
                for found in measure(
                    cell, taking_part, ceilings, request["rounds"], request["seed"], begins
                ):
                    say(measured=found.as_dict())
            say(finished=cell.id)


def _begins(say: Callable[..., None], cell: str, name: str) -> None:
    say(begins=name, cell=cell)


if __name__ == "__main__":
    main(json.load(sys.stdin))
