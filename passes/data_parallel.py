"""DataParallel: every rank has the whole model and a part of the batch.

Buckets of gradients: Li et al., PyTorch Distributed (arXiv:2006.15704).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch.distributed.device_mesh import DeviceMesh

from graphtune.distributed import DATA_AXES, Distribution, current_mesh
from graphtune.passes.base import Numerics, Pass, Stage
from graphtune.passes.units import DtypeName, describe, dtype_option, replicate, sum_replicated
from graphtune.rewrite import Edit
from graphtune.sites import Site


@dataclass(frozen=True)
class DataParallel(Pass):
    """Sums the gradients of replicated parameters over the ranks, one all-reduce for each layer.

    Parameters that train start as those of the first rank. A loss is to be divided by the number
    of tokens of all ranks, as `TrainStep` does; then gradients are those of one process with the
    whole batch.

    Attributes:
        mesh: the run's mesh; None: that of `graphtune.distributed.make_mesh`. All its axes along
            which tokens differ count.
        reduce_dtype: in which gradients are summed; None: their own.
    """

    mesh: DeviceMesh | None = None
    reduce_dtype: DtypeName | None = None

    name: ClassVar[str] = "data_parallel"
    stage: ClassVar[Stage] = Stage.DISTRIBUTE
    order: ClassVar[int] = 1  # after what divides matrices
    conflicts: ClassVar[frozenset[str]] = frozenset({"data_parallel", "fsdp"})

    def __post_init__(self) -> None:
        dtype_option("passes.data_parallel.reduce_dtype", self.reduce_dtype)

    @property
    def numerics(self) -> Numerics:
        return "exact"

    @property
    def badge(self) -> str:
        return "dp"

    def options(self) -> dict[str, object]:
        """The mesh as the sizes of its axes."""
        return {**super().options(), "mesh": describe(self._mesh())}

    def _mesh(self) -> DeviceMesh:
        return self.mesh or current_mesh("passes.data_parallel")

    def rewrite(self, edit: Edit) -> Iterable[Site]:
        mesh = self._mesh()
        names = [name for name, parameter in edit.parameters.items() if parameter.requires_grad]
        replicate(edit, names, mesh, DATA_AXES)
        dtype = dtype_option("passes.data_parallel.reduce_dtype", self.reduce_dtype)
        sum_replicated(edit, names, mesh, DATA_AXES, dtype)
        before = edit.distribution or Distribution(mesh)
        edit.distribution = dataclasses.replace(before, mesh=mesh)
        return [site for site in edit.sites("linear", "embedding", "experts")]
