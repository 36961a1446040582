"""Passes: one file for each technique. `registry` is what configs name."""

from graphtune.passes.activation_checkpoint import ActivationCheckpoint
from graphtune.passes.adapters import SetAdapter
from graphtune.passes.base import Pass, Stage
from graphtune.passes.causal_attention import CausalAttention
from graphtune.passes.context_parallel import ContextParallel
from graphtune.passes.convert import Convert
from graphtune.passes.data_parallel import DataParallel
from graphtune.passes.dora import DoRA
from graphtune.passes.fsdp import FSDP
from graphtune.passes.full import Freeze, Full
from graphtune.passes.fuse_adapters import FuseAdapters
from graphtune.passes.fused_loss import FusedLoss
from graphtune.passes.grouped_attention import GroupedAttention
from graphtune.passes.kv_cache import KVCache
from graphtune.passes.lora import LoRA
from graphtune.passes.merge import Merge, Unmerge
from graphtune.passes.neftune import NEFTune
from graphtune.passes.optimize import optimized
from graphtune.passes.qat import QAT
from graphtune.passes.qlora import QLoRA
from graphtune.passes.quantize import Quantize
from graphtune.passes.shared_mask import SharedMask
from graphtune.passes.tensor_parallel import TensorParallel

_ALL: tuple[type[Pass], ...] = (
    Quantize,
    LoRA,
    DoRA,
    QLoRA,
    SetAdapter,
    Full,
    Freeze,
    NEFTune,
    QAT,
    Merge,
    FusedLoss,
    Convert,
    ActivationCheckpoint,
    KVCache,
    TensorParallel,
    ContextParallel,
    DataParallel,
    FSDP,
    FuseAdapters,
    GroupedAttention,
    SharedMask,
    CausalAttention,
)
registry: dict[str, type[Pass]] = {one.name: one for one in _ALL}

__all__ = [
    "FSDP",
    "ActivationCheckpoint",
    "ContextParallel",
    "DataParallel",
    "QAT",
    "Convert",
    "DoRA",
    "Freeze",
    "Full",
    "FusedLoss",
    "KVCache",
    "CausalAttention",
    "FuseAdapters",
    "GroupedAttention",
    "LoRA",
    "Merge",
    "NEFTune",
    "Pass",
    "QLoRA",
    "Quantize",
    "SetAdapter",
    "SharedMask",
    "Stage",
    "TensorParallel",
    "Unmerge",
    "optimized",
    "registry",
]
