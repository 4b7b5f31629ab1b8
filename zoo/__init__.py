"""Efficient sequence mixers behind one layer contract.

    >>> from flax import nnx
    >>> from subquad import zoo
    >>> layer = zoo.make("softmax", in_features=64, num_heads=4, rngs=nnx.Rngs(0))
"""

from subquad.zoo import masks, positions
from subquad.zoo.base import Attention, Support
from subquad.zoo.block import Block, FeedForward
from subquad.zoo.buckets.reformer import ReformerAttention
from subquad.zoo.buckets.sinkhorn import SinkhornAttention
from subquad.zoo.conversion import convert
from subquad.zoo.dense.softmax import SoftmaxAttention
from subquad.zoo.dense.synthesizer import SynthesizerAttention
from subquad.zoo.encoder import Encoder
from subquad.zoo.features import RandomFeature
from subquad.zoo.generation import generate, stream
from subquad.zoo.interchange import attention_fn
from subquad.zoo.kernelized.cosformer import CosformerAttention
from subquad.zoo.kernelized.efficient import EfficientAttention
from subquad.zoo.kernelized.linear import LinearAttention
from subquad.zoo.kernelized.performer import PerformerAttention
from subquad.zoo.lowrank.linformer import LinformerAttention, LinformerProjection
from subquad.zoo.lowrank.nystrom import NystromAttention
from subquad.zoo.model import CausalLM, Classifier, DualEncoder
from subquad.zoo.patterns.blockwise import BlockwiseAttention
from subquad.zoo.patterns.local import LocalAttention
from subquad.zoo.patterns.longformer import LongformerAttention
from subquad.zoo.patterns.strided import StridedAttention
from subquad.zoo.recurrent.transformer_xl import TransformerXLAttention
from subquad.zoo.registry import LAYERS, make
from subquad.zoo.statespace.s4 import S4

__all__ = [
    "LAYERS", "S4", "Attention", "Block", "BlockwiseAttention", "CausalLM", "Classifier", "CosformerAttention", "DualEncoder",
    "EfficientAttention", "Encoder", "FeedForward", "LinearAttention", "LinformerAttention", "LinformerProjection",
    "LocalAttention", "LongformerAttention", "NystromAttention", "PerformerAttention", "RandomFeature", "ReformerAttention",
    "SinkhornAttention", "SoftmaxAttention", "StridedAttention", "Support", "SynthesizerAttention", "TransformerXLAttention",
    "attention_fn", "convert", "generate", "make", "masks", "positions", "stream",
]  # fmt: skip
