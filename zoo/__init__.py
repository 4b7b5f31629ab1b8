"""Efficient sequence mixers behind one layer contract.

    >>> from flax import nnx
    >>> from subquad import zoo
    >>> layer = zoo.make("softmax", in_features=64, num_heads=4, rngs=nnx.Rngs(0))
"""

from subquad.zoo import interop, masks, positions
from subquad.zoo.base import Attention, Support
from subquad.zoo.block import Block, FeedForward
from subquad.zoo.buckets.clustered import ClusteredAttention
from subquad.zoo.buckets.informer import InformerAttention
from subquad.zoo.buckets.moba import MoBAAttention
from subquad.zoo.buckets.nsa import NSAAttention
from subquad.zoo.buckets.reformer import ReformerAttention
from subquad.zoo.buckets.routing import RoutingAttention
from subquad.zoo.buckets.sinkhorn import SinkhornAttention
from subquad.zoo.buckets.smyrf import SmyrfAttention
from subquad.zoo.conversion import convert
from subquad.zoo.convolution.dynamicconv import DynamicConv
from subquad.zoo.convolution.hyena import Hyena
from subquad.zoo.convolution.lightconv import LightConv
from subquad.zoo.convolution.lsra import LSRA
from subquad.zoo.delta.delta_product import DeltaProduct
from subquad.zoo.delta.deltanet import DeltaNet
from subquad.zoo.delta.gated_deltanet import GatedDeltaNet
from subquad.zoo.delta.kda import KimiDeltaAttention
from subquad.zoo.delta.rwkv7 import RWKV7
from subquad.zoo.dense.differential import DifferentialAttention
from subquad.zoo.dense.entmax import EntmaxAttention
from subquad.zoo.dense.fnet import FNet
from subquad.zoo.dense.forgetting import ForgettingAttention
from subquad.zoo.dense.gau import GAU
from subquad.zoo.dense.kernelized import KernelizedAttention
from subquad.zoo.dense.softmax import SoftmaxAttention
from subquad.zoo.dense.stickbreaking import StickBreakingAttention
from subquad.zoo.dense.synthesizer import SynthesizerAttention
from subquad.zoo.encoder import Encoder
from subquad.zoo.experts import Experts, RouterLosses
from subquad.zoo.features import Centroids, RandomFeature
from subquad.zoo.gated.gla import GatedLinearAttention
from subquad.zoo.gated.gsa import GatedSlotAttention
from subquad.zoo.gated.hgrn2 import HGRN2
from subquad.zoo.gated.mamba2 import Mamba2
from subquad.zoo.gated.mlstm import MLSTM
from subquad.zoo.gated.retention import Retention
from subquad.zoo.gated.rwkv4 import RWKV4
from subquad.zoo.gated.rwkv6 import RWKV6
from subquad.zoo.generation import generate, stream
from subquad.zoo.hierarchical.h_transformer import HTransformerAttention
from subquad.zoo.interchange import attention_fn
from subquad.zoo.kernelized.based import BasedAttention
from subquad.zoo.kernelized.cosformer import CosformerAttention
from subquad.zoo.kernelized.dpfp import DPFPAttention
from subquad.zoo.kernelized.efficient import EfficientAttention
from subquad.zoo.kernelized.flash import FLASH
from subquad.zoo.kernelized.hedgehog import HedgehogAttention
from subquad.zoo.kernelized.linear import LinearAttention
from subquad.zoo.kernelized.performer import PerformerAttention
from subquad.zoo.kernelized.rfa import RFAAttention
from subquad.zoo.lowrank.isab import InducedSetAttention
from subquad.zoo.lowrank.linformer import LinformerAttention, LinformerProjection
from subquad.zoo.lowrank.luna import LunaAttention
from subquad.zoo.lowrank.memory_compressed import MemoryCompressedAttention
from subquad.zoo.lowrank.nystrom import NystromAttention
from subquad.zoo.lowrank.perceiver import PerceiverAttention
from subquad.zoo.lowrank.skyformer import SkyformerAttention
from subquad.zoo.model import CausalLM, Classifier, DualEncoder
from subquad.zoo.patterns.axial import AxialAttention
from subquad.zoo.patterns.bigbird import BigBirdAttention
from subquad.zoo.patterns.blockwise import BlockwiseAttention
from subquad.zoo.patterns.diagonal import DiagonalAttention
from subquad.zoo.patterns.global_tokens import GlobalAttention
from subquad.zoo.patterns.local import LocalAttention
from subquad.zoo.patterns.longformer import LongformerAttention
from subquad.zoo.patterns.longt5 import LongT5Attention
from subquad.zoo.patterns.random import RandomAttention
from subquad.zoo.patterns.strided import StridedAttention
from subquad.zoo.perceiver_ar import PerceiverAR
from subquad.zoo.recurrent.compressive import CompressiveAttention
from subquad.zoo.recurrent.infini import InfiniAttention
from subquad.zoo.recurrent.memorizing import MemorizingAttention
from subquad.zoo.recurrent.transformer_xl import TransformerXLAttention
from subquad.zoo.registry import LAYERS, make
from subquad.zoo.statespace.dss import DSS
from subquad.zoo.statespace.h3 import H3
from subquad.zoo.statespace.hgrn import HGRN
from subquad.zoo.statespace.lru import LRU
from subquad.zoo.statespace.mamba import Mamba
from subquad.zoo.statespace.mega import Mega
from subquad.zoo.statespace.rglru import RGLRU
from subquad.zoo.statespace.s4 import S4
from subquad.zoo.statespace.s5 import S5

__all__ = [
    "DSS", "FLASH", "GAU", "H3", "HGRN", "HGRN2", "LAYERS", "LRU", "LSRA", "MLSTM", "RGLRU", "RWKV4", "RWKV6", "RWKV7", "S4",
    "S5", "Attention", "AxialAttention", "BasedAttention", "BigBirdAttention", "Block", "BlockwiseAttention", "CausalLM",
    "Centroids", "Classifier", "ClusteredAttention", "CompressiveAttention", "CosformerAttention", "DPFPAttention",
    "DeltaNet", "DeltaProduct", "DiagonalAttention", "DifferentialAttention", "DualEncoder", "DynamicConv",
    "EfficientAttention", "Encoder", "EntmaxAttention", "Experts", "FNet", "FeedForward", "ForgettingAttention",
    "GatedDeltaNet", "GatedLinearAttention", "GatedSlotAttention", "GlobalAttention", "HTransformerAttention",
    "HedgehogAttention", "Hyena", "InducedSetAttention", "InfiniAttention", "InformerAttention", "KernelizedAttention",
    "KimiDeltaAttention", "LightConv", "LinearAttention", "LinformerAttention", "LinformerProjection", "LocalAttention",
    "LongT5Attention", "LongformerAttention", "LunaAttention", "Mamba", "Mamba2", "Mega", "MemorizingAttention",
    "MemoryCompressedAttention", "MoBAAttention", "NSAAttention", "NystromAttention", "PerceiverAR", "PerceiverAttention",
    "PerformerAttention", "RFAAttention", "RandomAttention", "RandomFeature", "ReformerAttention", "Retention",
    "RouterLosses", "RoutingAttention", "SinkhornAttention", "SkyformerAttention", "SmyrfAttention", "SoftmaxAttention",
    "StickBreakingAttention", "StridedAttention", "Support", "SynthesizerAttention", "TransformerXLAttention", "attention_fn",
    "convert", "generate", "interop", "make", "masks", "positions", "stream",
]  # fmt: skip


def __dir__() -> list[str]:
    """What completion shows: the public names, without the modules that they come from."""
    return sorted(__all__)
