"""Which replica makes which sample: lockstep, where all ranks are one replica, or pull, where a free replica takes the next one.

Both have the same interface (dispatcher.py). Rank 0 submits jobs from within `run(test)` and gets each result as soon as it is
ready; all other ranks serve. A sample that fails is tried once more, on another replica if there is one.
"""

from __future__ import annotations

from wan_mlperf.pipeline import Pipeline
from wan_mlperf.replicas.dispatcher import Dispatcher, FinishedSample, OnLost, OnResult, Pack, ServingDispatcher
from wan_mlperf.replicas.lockstep import Lockstep
from wan_mlperf.replicas.pull import Pull
from wan_mlperf.replicas.replica import Encode, Replica
from wan_mlperf.replicas.watch import Watch

__all__ = ["Dispatcher", "FinishedSample", "OnLost", "OnResult", "ServingDispatcher", "start"]


def start(pipeline: Pipeline, watch: Watch, *, pack: Pack, encode: Encode | None = None) -> ServingDispatcher:
    """Return this rank's dispatcher. Every rank calls it, with a pipeline that is warmed up for every shape it will get.

    `pack` turns frames into what rank 0 gets. `encode` does so while they are decoded, for jobs that it has an encoder for.
    Both run on the rank that made the frames.
    """
    kind = Lockstep if pipeline.mesh.shape.replicas == 1 else Pull
    dispatcher = kind(Replica(pipeline, watch, encode), watch, pack, batch=pipeline.recipe.offline.batch)
    pipeline.mesh.barrier()
    watch.idle()
    return dispatcher
