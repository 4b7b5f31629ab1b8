"""Layers by name: the table, and how to build one of it."""

from typing import Any

from flax import nnx

from subquad.zoo.base import Attention
from subquad.zoo.buckets.clustered import ClusteredAttention
from subquad.zoo.buckets.informer import InformerAttention
from subquad.zoo.buckets.moba import MoBAAttention
from subquad.zoo.buckets.nsa import NSAAttention
from subquad.zoo.buckets.reformer import ReformerAttention
from subquad.zoo.buckets.routing import RoutingAttention
from subquad.zoo.buckets.sinkhorn import SinkhornAttention
from subquad.zoo.buckets.smyrf import SmyrfAttention
from subquad.zoo.checks import check_rngs, check_word
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
from subquad.zoo.gated.gla import GatedLinearAttention
from subquad.zoo.gated.gsa import GatedSlotAttention
from subquad.zoo.gated.hgrn2 import HGRN2
from subquad.zoo.gated.mamba2 import Mamba2
from subquad.zoo.gated.mlstm import MLSTM
from subquad.zoo.gated.retention import Retention
from subquad.zoo.gated.rwkv4 import RWKV4
from subquad.zoo.gated.rwkv6 import RWKV6
from subquad.zoo.headless import Headless
from subquad.zoo.hierarchical.h_transformer import HTransformerAttention
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
from subquad.zoo.lowrank.linformer import LinformerAttention
from subquad.zoo.lowrank.luna import LunaAttention
from subquad.zoo.lowrank.memory_compressed import MemoryCompressedAttention
from subquad.zoo.lowrank.nystrom import NystromAttention
from subquad.zoo.lowrank.perceiver import PerceiverAttention
from subquad.zoo.lowrank.skyformer import SkyformerAttention
from subquad.zoo.options import check_complete, check_options, options_of
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
from subquad.zoo.recurrent.compressive import CompressiveAttention
from subquad.zoo.recurrent.infini import InfiniAttention
from subquad.zoo.recurrent.memorizing import MemorizingAttention
from subquad.zoo.recurrent.transformer_xl import TransformerXLAttention
from subquad.zoo.statespace.dss import DSS
from subquad.zoo.statespace.h3 import H3
from subquad.zoo.statespace.hgrn import HGRN
from subquad.zoo.statespace.lru import LRU
from subquad.zoo.statespace.mamba import Mamba
from subquad.zoo.statespace.mega import Mega
from subquad.zoo.statespace.rglru import RGLRU
from subquad.zoo.statespace.s4 import S4
from subquad.zoo.statespace.s5 import S5

Layer = Attention | Headless

LAYERS: dict[str, type[Attention] | type[Headless]] = {
    "softmax": SoftmaxAttention,
    "kernelized": KernelizedAttention,
    "entmax": EntmaxAttention,
    "forgetting": ForgettingAttention,
    "stickbreaking": StickBreakingAttention,
    "differential": DifferentialAttention,
    "gau": GAU,
    "synthesizer": SynthesizerAttention,
    "fnet": FNet,
    "blockwise": BlockwiseAttention,
    "local": LocalAttention,
    "diagonal": DiagonalAttention,
    "random": RandomAttention,
    "strided": StridedAttention,
    "axial": AxialAttention,
    "global": GlobalAttention,
    "longformer": LongformerAttention,
    "longt5": LongT5Attention,
    "bigbird": BigBirdAttention,
    "reformer": ReformerAttention,
    "routing": RoutingAttention,
    "sinkhorn": SinkhornAttention,
    "smyrf": SmyrfAttention,
    "informer": InformerAttention,
    "clustered": ClusteredAttention,
    "moba": MoBAAttention,
    "nsa": NSAAttention,
    "h_transformer": HTransformerAttention,
    "linformer": LinformerAttention,
    "nystrom": NystromAttention,
    "skyformer": SkyformerAttention,
    "luna": LunaAttention,
    "isab": InducedSetAttention,
    "perceiver": PerceiverAttention,
    "memory_compressed": MemoryCompressedAttention,
    "linear": LinearAttention,
    "performer": PerformerAttention,
    "cosformer": CosformerAttention,
    "efficient": EfficientAttention,
    "dpfp": DPFPAttention,
    "hedgehog": HedgehogAttention,
    "flash": FLASH,
    "rfa": RFAAttention,
    "based": BasedAttention,
    "retention": Retention,
    "gla": GatedLinearAttention,
    "hgrn2": HGRN2,
    "gsa": GatedSlotAttention,
    "mamba2": Mamba2,
    "rwkv6": RWKV6,
    "mlstm": MLSTM,
    "rwkv4": RWKV4,
    "transformer_xl": TransformerXLAttention,
    "compressive": CompressiveAttention,
    "infini": InfiniAttention,
    "memorizing": MemorizingAttention,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "kda": KimiDeltaAttention,
    "delta_product": DeltaProduct,
    "rwkv7": RWKV7,
    "s4": S4,
    "dss": DSS,
    "mega": Mega,
    "s5": S5,
    "lru": LRU,
    "rglru": RGLRU,
    "hgrn": HGRN,
    "h3": H3,
    "mamba": Mamba,
    "lightconv": LightConv,
    "dynamicconv": DynamicConv,
    "lsra": LSRA,
    "hyena": Hyena,
}


def find(name: str) -> type[Attention] | type[Headless]:
    """The class of a layer, or a ValueError with the nearest known name."""
    check_word("zoo", "layer", name, LAYERS)
    return LAYERS[name]


def options(name: str) -> set[str]:
    """The words that the constructor of a layer knows."""
    return options_of(find(name))


def make(name: str, *, in_features: int, rngs: nnx.Rngs, **given: Any) -> Layer:
    """A layer by its name.

    Args:
        name: a key of `LAYERS`.
        in_features: features D of the inputs.
        given: the layer's own options, and those of `Attention` where it has that shell.
    Raises: ValueError: unknown name.  TypeError: unknown or missing option.
    Example:
        >>> make("softmax", in_features=64, num_heads=4, rngs=nnx.Rngs(0))(jnp.ones((1, 10, 64))).shape
        (1, 10, 64)
    """
    layer: Any = find(name)
    check_options(layer.__name__, given, options(name))
    check_rngs(layer.__name__, rngs)
    check_complete(layer.__name__, layer, {"in_features", "rngs", *given})
    return layer(in_features=in_features, rngs=rngs, **given)
